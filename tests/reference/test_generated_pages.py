"""Pages of docs/reference that are written from the code are up to date; see `make docs`."""

from tests.reference import test_commands_page, test_messages_page


def test_commands_are_what_the_parsers_say(monkeypatch):
    monkeypatch.delenv("MEGAGPT_API_KEY", raising=False)
    made = test_commands_page.page()
    assert test_commands_page.PAGE.read_text(encoding="utf-8") == made, "run make docs"


def test_every_message_of_the_sources_is_on_its_page():
    made = test_messages_page.page()
    assert test_messages_page.PAGE.read_text(encoding="utf-8") == made, "run make docs"
