"""Files that users bring are read as what they are; concepts are found as they are written."""
import unicodedata
from dataclasses import replace

import pytest

import advunlearn as au
from sd_mini.lab import evaluation, prompts, settings, tasks
from sd_mini.lab.prompts import (PROMPTS, evaluation_rows, read_concepts, read_rows,
                                 training_prompts, without_concept)

from ..paper import SMALL

LONG = "a church " * 12  # over the toy's 24 tokens


@pytest.fixture
def concepts(write, monkeypatch):
    """concepts(text): as if prompts/concepts.csv held it."""
    def hold(text):
        path = write(text, "concepts.csv")
        monkeypatch.setattr(prompts, "CONCEPTS", path)
        return path
    return hold


def read(*arguments, **wanted):
    return [*read_rows(*arguments, **wanted)]


@pytest.mark.parametrize("text", [  # of I2P, UnlearnDiffAtk and others
    'prompt,hard,lexica_url,sd_seed,sd_guidance_scale\n"a church, at night",0,x,123,9\n',
    ',prompt,evaluation_seed,evaluation_guidance\n7,"a church, at night",123,9\n',
    '\ufeffcase_number, Prompt, Seed, guidance_scale\r\n0, "a church, at night", 123.0, 9\r\n',
    'target_prompt,adv_prompt,evaluation_seed,sd_seed,guidance\nx,"a church, at night",,123,9\n'])
def test_columns_go_by_all_their_names(write, text):
    assert read(write(text), "church") == [("a church, at night", 123, 9.0, "church")]


def test_seed_guidance_and_label_are_exact_or_have_defaults(write):
    path = write("prompt,seed,guidance,label\na,9007199254740993.0,,\nb,,4.5,boat\n")
    assert read(path, "church") == [("a", 9007199254740993, 7.5, "church"), ("b", 0, 4.5, "boat")]


@pytest.mark.parametrize("text, line, named", [
    ('prompt,seed\n"a church\nat night",7\na church,\nat night,7\na boat\n', 6, "quotes"),
    ('prompt,seed\n"a church\nat night",7\n\n \u3000,8\n', 5, "blank"),
    *[(f"prompt,sd_seed\na church,7\na church,{seed}\n", 3, f"seed '{seed}'")
      for seed in ("-7", "1.5", "9223372036854775808")],
    *[(f'prompt,guidance\n"a\n\nchurch","{number}"\n', 4, f"guidance '{number}'")
      for number in ("7,5", "nan")],
    ("prompt;seed\na church;7\n", 1, "'prompt;seed'"), ("", 1, "'prompt'"),
    ('prompt\na church\n"a boat\n', 2, "CSV"), (b"prompt\r\ncaf\xe9\r\n", None, "UTF-8"),
    ("prompt,seed\n", None, "no rows")])
def test_what_is_not_as_it_seems_is_refused_with_its_physical_line(write, text, line, named):
    path = write(text)
    with pytest.raises(ValueError) as error:
        read(path, "church")
    assert str(error.value).startswith(f"{path}, line {line}: " if line else f"{path}: ")
    assert named in str(error.value)


def rows_for(sd, path, room=5, **changes):
    """The rows to attack from a file of one's own, on the toy."""
    config = replace(SMALL, eval_set=str(path), **changes)
    return evaluation.rows_to_attack(sd, read_concepts("church"), config, room)


def test_only_rows_that_are_used_are_read(sd, write):
    """I2P has an empty prompt in row 2,260; of a suite's rows in other roles no seed is read."""
    path = write("role,prompt,seed\nstyle,a church,7\nother,a chapel,8\nother,a minster,eight\n")
    assert [row.seed for row in rows_for(sd, path, eval_prompts=2)] == [7, 8]
    assert [row.seed for row in read(path, "church", role="style")] == [7]
    with pytest.raises(ValueError, match="line 4"):
        rows_for(sd, path, eval_prompts=3)


def test_prompts_that_leave_no_room_for_the_prefix_are_left_out_with_a_note(sd, write, capsys):
    """To the token. As many are used as were asked for."""
    path = write(f"prompt,seed\na church,7\n{LONG},6\na chapel,8\n{LONG},9\na church at night,10\n")
    assert [row.seed for row in rows_for(sd, path)] == [7, 8, 10]
    assert "--eval-set: 2 of 5 prompts" in capsys.readouterr().out
    assert [row.seed for row in rows_for(sd, path, eval_prompts=2)] == [7, 8]
    path = write("prompt\na photo of a church\n")
    room = sd.context_length - len(sd.tokenizer("a photo of a church").input_ids)
    assert rows_for(sd, path, room)
    with pytest.raises(ValueError, match="--eval-set"):
        rows_for(sd, path, room + 1)


def test_prompts_come_from_the_concepts_file_or_from_templates(sd):
    """Those of several concepts each from its own, with seeds that no two share."""
    both = read_concepts("church, Unicorn")
    church, unicorn = ([*evaluation_rows(c, replace(SMALL, eval_prompts=60))] for c in both)
    assert unicorn[0] == ("a photo of a unicorn", 5000, 7.5, "unicorn") and len(church) == 50
    assert len({row.seed for row in church + unicorn}) == 110
    rows = evaluation.rows_to_attack(sd, both, replace(SMALL, eval_prompts=3), 5)
    assert rows == church[:3] + unicorn[:3]


@pytest.mark.parametrize("concept", ["church", "garbage truck", "parachute", "tench", "van gogh"])
def test_prompts_to_attack_name_the_concept_and_no_others_do(concept):
    rows = [*evaluation_rows(*read_concepts(concept), SMALL)]
    assert all(concept in row.prompt.lower() != concept for row in rows) and len(rows) == 50
    others = [row for path in PROMPTS.glob("suite_*.csv") for role in ("paraphrase", "neighbour")
              for row in read(path, role=role, concept=concept)]
    assert others and not any(concept in row.prompt.lower() for row in others)


@pytest.mark.parametrize("text, named", [
    ("concept,kind\ndome,thing\n", "'thing'"), ("concept,layers\ndome,1\n", "'layers'")])
def test_a_mistake_in_the_list_of_concepts_is_named(concepts, text, named):
    path = concepts(text)
    with pytest.raises(ValueError, match=f"{path}, line 2: .*{named}"):
        read_concepts("dome")


def test_the_list_of_concepts_is_read_as_prompts_are_and_each_counts_once(concepts):
    concepts("\ufeffConcept, Kind, Synonyms,classifier,not_retained\n"
             "Blue Dome, Style, cupola | rotunda,own/model:dome,roof|\nspire,,,,\nnever,thing,,,\n")
    dome, spire, other = read_concepts("blue  dome, SPIRE,tower,Tower , spire")
    assert dome == ("blue dome", "style", ("cupola", "rotunda"), "own/model:dome", ("roof",))
    assert spire == ("spire", "object", (), "microsoft/resnet-50", ())
    assert other == ("tower", *spire[1:])


def test_concepts_of_different_classifiers_need_one_for_all():
    both, config = read_concepts("church,van gogh"), replace(SMALL, classifier="some/clip")
    assert evaluation.classifier_of(both, config, toy=False) == "some/clip"
    assert evaluation.classifier_of(both, SMALL, toy=True) is None
    with pytest.raises(ValueError, match="resnet-50 and openai.* with --classifier"):
        evaluation.classifier_of(both, SMALL, toy=False)


@pytest.mark.parametrize("model, words, wanted", [
    ("some/model", "church,nudity", (0, 0.3, 50)), ("toy", "nudity", (0, 2.0, 24)),
    ("toy", "nudity --layers 2", (2, 2.0, 24))])
def test_flags_come_before_the_toys_settings_and_these_before_the_concepts(model, words, wanted):
    words = ["--model", model, "--concept", *words.split()]
    config = tasks.resolve(au.METHOD, settings.parse(au.Config, words))
    assert (config.layers, config.retain_weight, config.eval_prompts) == wanted


@pytest.mark.parametrize("word, found, other", [
    ("church", "two Churches, at night", "churchill"), ("car", "a car", "oscar"),
    ("C++", "a C++ logo", "a c"), (".NET", "a poster of .NET", "a net"),
    ("bus", "red buses", "bus2"), ("教堂", "一座教堂在山上", "山上"), ("Straße", "EINE STRASSE", "Strassen"),
    ("été", unicodedata.normalize("NFD", "deux étés"), "répétée"),
    ("garbage truck", "Garbage\n trucks", "garbage"), ("van gogh", "van Gogh’s chair", "gogh")])
def test_a_concept_is_found_as_it_is_written_and_not_within_another_word(word, found, other):
    assert without_concept([found, other], ("x", word)) == ([other], [found])


def test_retain_prompts_name_no_concept_and_no_synonym_and_fit(sd, write, concepts):
    """Each concept counts, with all its words, and what is too near to be retained."""
    concepts("concept,synonyms,not_retained\nchurch,chapel|minster,steeple\nboat,ship,oar\n")
    path = write("prompt\na tree\nA Minster\na chapel\ntwo ships\na steeple\noars\na boat\n"
                 f"a house\n{'a tree ' * 15}\nchurches\n")
    config, both = replace(SMALL, retain_set=str(path)), read_concepts("church,boat")
    erase, retain, notes = training_prompts(both, config, sd)
    assert erase == ["church", "boat"] and retain == ["a tree", "a house"] and len(notes) == 2
    assert "A Minster, a chapel, two ships, a steeple, oars, a boat, churches" in notes[0]
    assert "1 of 3 prompts" in notes[1]
    assert len(training_prompts(both, replace(config, retain_unfiltered=True), sd)[1]) == 9
    with pytest.raises(ValueError, match="--retain-set"):
        training_prompts(both, replace(config, retain_set=str(write("prompt\na ship\n"))))


def dropped(concept, retain_set):
    """What the retain set loses, to erase this concept."""
    every, retained = (training_prompts(read_concepts(name), au.Config(retain_set=retain_set))[1]
                       for name in ("unicorn", concept))
    return [prompt for prompt in every if prompt not in retained]


def test_nudity_retains_neither_people_nor_underwear(write):
    """... nor what the published filter took out, where our lists have it; other clothes stay."""
    lost = {"coco": "person, man, woman, child, boy, girl, baby, shirt, dress, players",
            "imagenet": "ear, bikini, miniskirt, scuba diver, gown, academic gown, hip, swimming "
                        "trunks, nail, lipstick, pajama, ballet shoe, maillot"}
    own = write("prompt\ntwo men\nbras\nher feet\na manual\na tape player\na jacket\n")
    for name, things in {**lost, str(own): "two men, bras, her feet"}.items():
        found, things = dropped("nudity", name), things.split(", ")
        assert len(found) == len(things) and all(map(str.endswith, found, things)), found


def test_the_shipped_retain_sets_lose_what_they_lost():
    for name in ("coco", "imagenet"):  # the published imagenet holds a church, too
        config = au.Config(retain_set=name, retain_unfiltered=True)
        assert dropped("church", name) == ["a photo of a church"]
        assert len({*training_prompts([], config)[1]}) == 243


SUITE = """role,concept,prompt,label
paraphrase,church,a minster,church
paraphrase,church,a chapel,church
paraphrase,church,an old chapel,church
paraphrase,boat,a ship,boat
neighbour,church,a house,house
neighbour,church,a house by two ships,house
neighbour,boat,a car,car
neighbour,boat,a grey tower,church
style,,a sketch of a Chapel,sketch
style,,a sketch of a tree,sketch
style,,a mosaic of a tree,mosaic
utility,,a tree near a minster,tree
utility,,a tree,tree
utility,,a whale,whale
"""


def test_other_prompts_name_no_concept_and_no_synonym(sd, write, concepts, monkeypatch, capsys):
    """Of any of the concepts. Labels that the classifier does not know count in utility alone."""
    concepts("concept,synonyms\nchurch,chapel|minster\nboat,ship\n")
    monkeypatch.setattr(evaluation, "PROMPTS", write(SUITE, "suite_toy.csv").parent)

    def loaded(names, text, **changes):
        config = replace(SMALL, concept=names, eval_set=str(write(text)), eval_utility=2, **changes)
        found = evaluation.load_evaluation_set(sd, read_concepts(names), config)
        return [[row.prompt for row in getattr(found, part)] for part in evaluation.PARTS]

    three = "prompt,label\na church,church\na boat,boat\na whale,whale\n"
    assert loaded("church,boat", three, eval_prompts=2) == [
        ["a church", "a boat"], ["a minster", "a chapel", "a ship"], ["a house", "a car"],
        ["a sketch of a tree"], ["a tree", "a whale"]]
    assert "mosaic, whale" in capsys.readouterr().out
    assert loaded("boat", three, eval_prompts=1) == [["a church"], ["a ship"], ["a car"], [
        "a sketch of a Chapel"], ["a tree near a minster", "a tree"]]
    with pytest.raises(ValueError, match="--classifier MODEL:LABEL"):
        loaded("church", "prompt,label\na whale,whale\n")
