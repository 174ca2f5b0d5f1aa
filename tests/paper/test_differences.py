"""Each row of TUTORIAL.md's table of differences (section 11) has a test of our side."""
import re

from sd_mini.lab.prompts import read_concepts

from .. import bench

TESTS = {  # a test: a piece of the first cell of each row that it is of
    "test_layers_are_the_first_by_index": ["by the beginning of their names"],
    "test_esd_x_is_the_cross_attention_and_esd_u_all_else": ["ESD-u leaves out the time embedding"],
    "test_any_prompt_and_prefix_keep_start_end_and_length": ["concept's length in words"],
    "test_embeddings_descend_by_each_steps_gradient_alone": ["never zeroes the gradient"],
    "test_legal_tokens_are_those_that_survive_as_text": ["searches the whole vocabulary"],
    "test_p_descends_by_adamw_and_projection_on_the_gradient_at_tokens_drawn": [
        "clips the gradient", "uses Adam with weight decay"],
    "test_the_attack_of_the_config": ["`fast_at` still loops"],
    "test_each_row_is_attacked_at_its_own_prompt_and_at_each_steps_latents": [
        "updates never reach the UNet", "starts the attack at random ids",
        "erases at the prefix from before Adam's last", "one prefix for one prompt"],
    "test_the_bank_has_as_many_runs_of_each_prompt_and_draws_any_of_them": [
        "tells the UNet a t of 500 to 519", "draws t evenly from 0 to 999",
        "erase and retain share one t", "without replacement"],
    "test_each_iteration_is_the_algorithms": ["samples $x_t$ with the UNet in training"],
    "test_unet_evaluations_are_those_of_the_formula": ["samples anew for every"],
    "test_a_seed_gives_the_same_bytes_resumed_or_not": ["no seeds, no resume"],
    "test_defaults_are_the_published_ones": ["argument defaults contradict its README"],
    "test_the_shipped_retain_sets_lose_what_they_lost": ["its ImageNet retain list holds"],
    "test_nudity_retains_neither_people_nor_underwear": ["its retain lists are fixed"],
    "test_each_row_and_step_has_a_t_and_a_noise_of_its_own_by_the_seed": [
        "at up to 50 time steps in turn"],
    "test_three_tokens_stand_in_front_five_on_the_toy_or_when_asked": ["puts 5 tokens in front"],
    "test_a_run_is_ddim_under_guidance_3": ["LMS sampler"],
    "test_classifiers_are_these": ["judges are NudeNet"],
}


def test_each_row_of_the_table_has_a_test():
    section = (bench.ROOT / "TUTORIAL.md").read_text(encoding="utf-8").split("\n## 11. ")[1]
    lines = [line for line in section.split("\n## ")[0].split("\n") if line.startswith("| ")]
    cells = [line.split(" | ")[0] for line in lines[2:]]
    pieces = sum(TESTS.values(), [])
    assert [sum(piece in cell for piece in pieces) for cell in cells] == [1] * len(pieces)
    tests = [path.read_text(encoding="utf-8") for path in (bench.ROOT / "tests").rglob("test_*.py")]
    assert TESTS.keys() <= {*re.findall(r"^def (test_\w+)", "\n".join(tests), re.M)}


def test_classifiers_are_these():
    assert [concept.classifier for concept in read_concepts("nudity,van gogh,tench,snowman")] == [
        "Falconsai/nsfw_image_detection:nsfw",
        "openai/clip-vit-large-patch14:a painting by Vincent van Gogh",
        *["microsoft/resnet-50"] * 2]
