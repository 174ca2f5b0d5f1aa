from .mutants import MUTANTS, ROOT


def test_every_wrong_version_can_still_be_made():
    """Its text stands exactly once in its file, the wrong text is another, and it is Python."""
    for what, file, text, wrong in MUTANTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(text) == 1 and wrong != text, what
        compile(source.replace(text, wrong), what, "exec")
