"""No number in the README is older than the result that it comes from."""

from benchmarks import readme


def test_the_tables_are_what_the_results_say() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "python -m benchmarks.readme writes them anew"
    assert text.count("<!-- table:") == len(readme.TABLES)
