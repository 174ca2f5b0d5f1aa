"""Files that users bring are read as what they are, and concepts are found as they are written.

The files here have the headers and the faults of published ones (UnlearnDiffAtk's, I2P on the hub,
ESD's) with sentences of our own.
"""
import unicodedata
from dataclasses import replace

import pytest

import advunlearn as au
from sd_mini.lab import evaluation, experiment, prompts
from sd_mini.lab.prompts import (evaluation_rows, folded, one_of, read_concepts, read_rows,
                                 training_prompts, without_concept)

from ..paper import SMALL
from .test_faults import cli
from .test_run import FLAGS

LONG = "a church " * 12  # over the toy's 24 tokens
WHOLE = "must be a whole number from 0 on"
HUB = ("prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
       "sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,"
       "sd_image_height,sd_model")
ATTACKED = ("Unnamed: 0," + HUB.replace("sd_seed,sd_guidance_scale",
                                        "evaluation_seed,evaluation_guidance") + ",case_number")


def published(prompt, seed, guidance="7"):
    """A row under HUB."""
    return (f'"{prompt}",shocking,0,10.0,0.0,10.0,40.0,0.05,https://x.org/p,{seed},{guidance},512,'
            "512,stable-diffusion-v1-4")


@pytest.fixture
def write(tmp_path):
    """write(text or bytes) -> the path of a CSV file."""
    def to(text, name="mine.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path
    return to


def read(*arguments, **wanted):
    return [*read_rows(*arguments, **wanted)]


def rows_for(sd, path, concepts="church", room=5, eval_prompts=50):
    """The evaluation set's rows from a file of one's own, on the toy."""
    config = replace(SMALL, concept=concepts, eval_set=str(path), eval_prompts=eval_prompts)
    return evaluation.load_evaluation_set(sd, read_concepts(concepts), config, room).rows


def refused(path, message, **wanted):
    with pytest.raises(ValueError) as error:
        read(path, "church", **wanted)
    assert str(error.value) == f"{path}{message}"


# --- a CSV is read as what it is

@pytest.mark.parametrize("text", [
    f"{HUB}\n{published('a church, at night', 123, 9)}\n",
    f"{ATTACKED}\n21,{published('a church, at night', 123, 9)},21\n",
    f"\ufeff{HUB.replace(',', ' , ').upper()}\n{published('a church, at night', 123, 9)}\n",
    'case_number, prompt, seed, guidance_scale\n0, "a church, at night", 123, 9.0\n',
    'Prompt,Seed,Guidance\r\n"a church, at night",123.0,9\r\n',
    'target_prompt,adv_prompt,sd_seed,guidance\nx,"a church, at night",123.000,9\n',
    'prompt,evaluation_seed,sd_seed,evaluation_guidance\n"a church, at night",,123,9\n'])
def test_columns_go_by_all_their_names(write, text, capsys):
    assert read(write(text), "church") == [("a church, at night", 123, 9.0, "church")]
    assert not capsys.readouterr().out


def test_a_large_seed_that_pandas_wrote_is_exact(write):
    path = write("prompt,sd_seed\na church,4261553411.0\na church,9007199254740993.0\n")
    assert [row.seed for row in read(path, "church")] == [4261553411, 9007199254740993]


@pytest.mark.parametrize("text, message", [
    ("prompt,seed\na church, at night,7\n",
     ", line 2: fields: 3, in the header: 2; a text with a comma in it needs quotes"),
    ('prompt,seed\n"a church\nat night",7\na church,\nat night,7\na boat\n',
     ", line 6: fields: 1, in the header: 2; a text with a comma in it needs quotes"),
    ('prompt,seed\n"a church\nat night",7\n\n   ,8\n', ", line 5: its prompt is blank"),
    ("prompt\na church\n\u3000\n", ", line 3: its prompt is blank"),
    ("prompt,sd_seed\na church,7\na church,seven\n", f", line 3: seed 'seven': {WHOLE}"),
    ("prompt,seed\na church,-7\n", f", line 2: seed '-7': {WHOLE}"),
    ("prompt,seed\na church,1.5\n", f", line 2: seed '1.5': {WHOLE}"),
    ("prompt,seed\na church,9223372036854775808\n",
     f", line 2: seed '9223372036854775808': {WHOLE}"),
    ('prompt,sd_guidance_scale\n"a\n\nchurch","7,5"\n',
     ", line 4: guidance '7,5': must be a number from 0 on"),
    ("prompt,guidance\na church,nan\n", ", line 2: guidance 'nan': must be a number from 0 on"),
    ("prompt;seed\na church;7\n", ", line 1: no column 'prompt' among 'prompt;seed'"),
    ('prompt\na church\n"a boat\n', ", line 2: what follows is no CSV in UTF-8: unexpected end of "
     "data"),
    (b"prompt\r\na church\r\ncaf\xe9\r\n", ": what follows is no CSV in UTF-8: 'utf-8' codec can't "
     "decode byte 0xe9 in position 21: invalid continuation byte"),
    ("", ", line 1: no column 'prompt' among ''"),
    ("prompt,seed\n", ": holds no rows")])
def test_what_is_not_as_it_seems_is_refused_with_its_physical_line(write, text, message):
    refused(write(text), message)


def test_a_row_without_a_seed_has_seed_0(write):
    path = write("prompt,seed\na church,5\na chapel,\n")
    assert [row.seed for row in read(path, "church")] == [5, 0]


# --- one row never shuts out a file

def test_only_rows_that_are_used_are_read(sd, write, capsys):
    """I2P has an empty prompt in row 2,260; a suite's rows in other roles are not used either."""
    path = write(f"{HUB}\n{published('a church', 7)}\n{published('a chapel', 8)}\n"
                 f"{published(' ', 9)}\nan unquoted, comma\n{published('a church', 'x')}\n")
    assert [row.seed for row in rows_for(sd, path, eval_prompts=2)] == [7, 8]
    with pytest.raises(ValueError, match="line 4: its prompt is blank"):
        rows_for(sd, path, eval_prompts=3)
    path = write("role,prompt,seed\nstyle,a sketch,7\nother,a church,seven\nother,,8\n")
    assert len(read(path, "church", role="style")) == 1
    refused(path, f", line 3: seed 'seven': {WHOLE}", role="other")


def test_prompts_that_are_too_long_are_left_out_with_one_note(sd, write, capsys):
    lines = [published(*each) for each in (("a church", 7), (LONG, 6), ("a chapel", 8),
                                           (LONG + "at night", 9), ("a church at night", 10))]
    path = write("\n".join([HUB, *lines]))
    assert [row.seed for row in rows_for(sd, path)] == [7, 8, 10]
    out = capsys.readouterr().out
    assert out.count("left out") == 1
    assert "note: --eval-set: 2 of 5 prompts are left out, since they take more than 19 tok" in out
    assert "(24 that the model reads, less a prefix of 5); the first, 'a church a" in out
    assert [row.seed for row in rows_for(sd, path, eval_prompts=2)] == [7, 8]  # the first that fit
    assert "1 of 3 prompts are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--eval-set: every prompt takes more than 19 tokens"):
        rows_for(sd, write(f"prompt\n{LONG}\n"))


def test_room_for_the_prefix_is_counted_to_the_token(sd, write):
    prompt = "a photo of a church"
    path, tokens = write(f"prompt,seed\n{prompt},7\n"), len(sd.tokenizer(prompt).input_ids)
    assert rows_for(sd, path, room=sd.context_length - tokens)
    with pytest.raises(ValueError, match="every prompt"):
        rows_for(sd, path, room=sd.context_length - tokens + 1)


def test_a_concepts_file_and_templates_lose_them_too(sd, write, monkeypatch, capsys):
    path = write(f"prompt,seed\n{LONG},7\na church,8\n", "church.csv")
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "PROMPTS", path.parent)
        config = replace(SMALL, eval_prompts=3)
        [row] = evaluation.rows_to_attack(sd, read_concepts("church"), config, 5)
    assert row.seed == 8 and "prompts of church: 1 of 2" in capsys.readouterr().out
    rows = evaluation.rows_to_attack(sd, [prompts.Concept("unicorn")], config, 11)
    out = capsys.readouterr().out
    assert 0 < len(rows) < 3 and "prompts of unicorn: " in out and "less a prefix of 11" in out


def test_a_retain_prompt_that_is_too_long_is_left_out(sd, write, capsys):
    long = "a boat " * 12
    path = write(f"prompt\na house\n{long}\na chapel\na tree\n")
    flags = [*FLAGS, "--eval-attacks", "token", "--out", str(path.parent / "run")]
    status, line, out = cli(*flags, "--retain-set", str(path))
    assert status == 0, line
    note = f"note: --retain-set {path}: 1 of 3 prompts are left out"
    assert out.count(note) == 1 and "less a prefix of 0); the first, 'a boat a boat" in out
    config = replace(SMALL, retain_set=str(path))
    assert training_prompts(read_concepts("church"), config, sd)[1] == ["a house", "a tree"]
    path = write(f"prompt\n{long}\n", "long.csv")
    status, line, _ = cli(*flags, "--overwrite", "--retain-set", str(path))
    assert status == 2 and f"--retain-set {path}: every prompt takes more than 24 tokens" in line


def test_prompts_to_erase_are_still_refused(sd, monkeypatch):
    monkeypatch.setattr(experiment, "load_model", lambda config: sd)
    config = replace(SMALL, concept="church", prefix=30)
    with pytest.raises(ValueError, match="with 30 more it exceeds the 24 that the model reads"):
        experiment.open_experiment(au.METHOD, config)


# --- concepts.csv, which users edit

HEADER = "concept,kind,synonyms,classifier\n"


@pytest.fixture
def concepts(write, monkeypatch):
    """concepts(text): as if prompts/concepts.csv held it."""
    def hold(text):
        path = write(text, "concepts.csv")
        monkeypatch.setattr(prompts, "CONCEPTS", path, raising=False)
        monkeypatch.setattr(prompts, "PROMPTS", path.parent)
        return path
    return hold


@pytest.mark.parametrize("text, message", [
    (HEADER + "dome,thing,,\n", "line 2: kind 'thing': choose from object, style"),
    (HEADER + "dome,object,a, b,\n", "line 2: fields: 5, in the header: 4; a text with a"),
    ("concept,layers\ndome,1\n", "line 2: column 'layers': settings are flags")])
def test_a_mistake_in_the_list_of_concepts_is_one_line(concepts, text, message):
    path = concepts(text)
    status, line, _ = cli(*FLAGS, "--concept", "dome", "--out", str(path.parent / "new"))
    assert status == 2 and line.startswith(f"error: {path}, {message}"), line


def test_the_list_of_concepts_is_read_as_prompts_are(concepts):
    concepts("\ufeffConcept, Kind, Synonyms\n" "Blue Dome, Style, cupola | rotunda\n"
             "spire,,\n" "never asked for,thing,\n")
    dome, spire, other = read_concepts("blue  dome, SPIRE,tower,tower,Tower , spire")
    assert dome[:3] == ("blue dome", "style", ("cupola", "rotunda"))
    assert spire[:3] == ("spire", "object", ()) and other.name == "tower"


def test_a_concept_counts_once(sd):
    assert [c.name for c in read_concepts("church,church")] == ["church"]
    assert [c.name for c in read_concepts("van gogh, Church,van  gogh")] == ["van gogh", "church"]
    config = replace(SMALL, concept="church,church", eval_prompts=3)
    found = evaluation.load_evaluation_set(sd, read_concepts("church,church"), config)
    assert len(found.rows) == 3


@pytest.mark.parametrize("names", ["church,van gogh", "van gogh,church", "tench,nudity"])
def test_concepts_of_different_classifiers_need_one_for_all(sd, names, monkeypatch):
    listed, given = read_concepts(names), []
    config = replace(SMALL, concept=names, model="some/model")
    with pytest.raises(ValueError) as error:
        evaluation.load_evaluation_set(sd, listed, config)
    message = str(error.value)
    assert all(concept.classifier in message for concept in listed)
    assert "give one for all with --classifier" in message and "\n" not in message

    def load_classifier(spec, *others):
        given.append(spec)
        raise InterruptedError

    monkeypatch.setattr(evaluation.classifiers, "load_classifier", load_classifier)
    for concept, own in ((names, "some/clip"), ("church,tench", None)):
        with pytest.raises(InterruptedError):
            evaluation.load_evaluation_set(sd, read_concepts(concept),
                                           replace(config, classifier=own))
    assert given == ["some/clip", "microsoft/resnet-50"]


# --- the concept is found in prompts

@pytest.mark.parametrize("word, prompt", [
    ("church", "two Churches, at night"), ("C++", "a C++ logo"), (".NET", "a poster of .NET"),
    ("F#", "an F# sticker"), ("bus", "red buses"), ("教堂", "一座教堂在山上"),
    ("ねこ", "かわいいねこの絵"), ("カメラ", "古いカメラです"),
    ("โบสถ์", "ภาพโบสถ์สีขาว"), ("교회", "언덕 위의 교회에서"),
    ("café", unicodedata.normalize("NFD", "two cafés")), (unicodedata.normalize("NFD", "crème"),
                                                        "CRÈME"),
    ("Straße", "EINE STRASSE"), ("strasse", "eine Straße"), ("ΣΊΣΥΦΟΣ", "ο σίσυφος"),
    ("garbage truck", "Garbage\n trucks"), ("church", "«church»"),
    ("van gogh", "van Gogh’s chair"), ("церковь", "старая Церковь")])
def test_a_concept_is_found_as_it_is_written(word, prompt):
    assert without_concept([prompt, "a boat"], (word,)) == (["a boat"], [prompt])


@pytest.mark.parametrize("word, prompt", [
    ("church", "churchill"), ("car", "a cart"), ("car", "oscar"), ("кот", "который"),
    ("art", "a party"), ("été", "répétée"), ("man", "menu"), ("C++", "a c"), (".NET", "a net"),
    ("tea", "tea2"), ("straße", "strassen")])
def test_a_concept_is_not_found_within_another_word(word, prompt):
    assert without_concept([prompt], (word,)) == ([prompt], [])


def test_nudity_retains_neither_people_nor_underwear(write):
    """... nor what the published filter took out of such lists; and other clothes stay."""
    lost = {"coco": "person, man, woman, child, boy, girl, baby, shirt, dress, players",
            "imagenet": "ear, bikini, miniskirt, scuba diver, gown, academic gown, hip, swimming "
                        "trunks, nail, lipstick, pajama, ballet shoe, maillot"}
    own = write("prompt\ntwo men\nbras\nher feet\na manual\na tape player\na jacket\n")
    for name, things in {**lost, str(own): "two men, bras, her feet"}.items():
        retained = training_prompts(read_concepts("nudity"), au.Config(retain_set=name))[1]
        every = training_prompts(read_concepts("church,unicorn"), au.Config(
            retain_set=name, retain_unfiltered=True))[1]
        dropped = [p for p in every if p not in retained]
        things = things.split(", ")
        assert len(dropped) == len(things) and all(map(str.endswith, dropped, things)), dropped


def test_the_shipped_retain_sets_lose_what_they_lost():
    for name, lost in (("coco", ["a photo of a church"]), ("imagenet", ["a photo of a church"])):
        config = au.Config(retain_set=name)
        retained = training_prompts(read_concepts("church"), config)[1]
        every = training_prompts([prompts.Concept("unicorn")], config)[1]
        assert sorted({*every} - {*retained}) == lost


def test_the_inversion_attack_finds_the_concept_too(sd, monkeypatch):
    seen, rows = [], [prompts.Row(text, 1, 7.5, "教堂")
                      for text in ("一座教堂在山上", "eine STRASSE im Schnee", "A Boat")]

    def attack(sd, prompts, pictures, config):
        seen.extend(prompts)
        return pictures

    monkeypatch.setattr(evaluation, "draw_rows", lambda *arguments: None)
    monkeypatch.setattr(evaluation, "shown", lambda classifier, pictures, rows: [True] * len(rows))
    given = evaluation.EvaluationSet(rows, [], [], [], [], None, None, ["教堂", "Straße"],
                                     {"rows": sd.initial_noise([1, 2, 3])})
    evaluation.invert_concepts(sd, given, [0, 1, 2], attack, SMALL)
    assert seen == ["一座 * 在山上", "eine  *  im schnee", "* A Boat"]


def test_one_pattern_for_several_words():
    named = one_of(["bus", "C++", "教堂"])
    assert named.sub(" * ", folded("Buses and c++, 一座教堂")) == " *  and  * , 一座 * "


def test_evaluation_rows_are_those_of_before():
    church, unicorn = read_concepts("church,unicorn")
    config = au.Config(eval_prompts=4)
    first = [row.seed for row in evaluation_rows(church, config)][:4]
    assert first == [1000, 1001, 1002, 1003]
    assert [row.seed for row in evaluation_rows(unicorn, config)] == [5000, 5001, 5002, 5003]
