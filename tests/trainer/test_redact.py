"""Secrets are blanked wherever they stand, and nothing else is changed."""

import logging
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.trainer.redact import RedactingFormatter, redacted

PLANTED = {
    "https://me:hunter2@host/path": "https://me:***@host/path",
    "see s3+http://u:p%40ss:word@h:80/x?y=1, then": "see s3+http://u:***@h:80/x?y=1, then",
    "postgres://:secret@db": "postgres://:***@db",
    "https://u:p@ss@host/": "https://u:***@host/",
    "https://h/d?token=abc&n=3": "https://h/d?token=***&n=3",
    "https://h/d?n=3&access_token=abc#top": "https://h/d?n=3&access_token=***#top",
    "https://h/d?X-Amz-Signature=abc&X-Amz-Date=1": "https://h/d?X-Amz-Signature=***&X-Amz-Date=1",
    "https://h/d?X-Amz-Credential=a/b&sig=x%2By": "https://h/d?X-Amz-Credential=***&sig=***",
    "https://h/d?apikey=1&API_KEY=2&key=3&auth=4": "https://h/d?apikey=***&API_KEY=***&key=***&auth=***",
    "wandb said: 0123456789abcdef is wrong": "wandb said: *** is wrong",
    "0123456789abcdef-and-more": "***",
}
PLAIN = [
    "",
    "https://host:8080/path?page=2&monkey=3",
    "me@example.org: ratio 3:4",
    "optim.lr=0.1 key=3",
    "ssh://git@host/repo",
    "shorty",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("my_hub_token_2", "0123456789abcdef-and-more")
    monkeypatch.setenv("SHORT_PASSWORD", "shorty")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "8 characters and more")
    monkeypatch.setenv("HARMLESS", "8 characters and more")


@pytest.mark.parametrize(("text", "want"), PLANTED.items(), ids=PLANTED)
def test_a_secret_is_blanked_where_it_stands(text, want):
    assert redacted(text) == want
    assert redacted(want) == want


@pytest.mark.parametrize("text", [*PLAIN, "8 characters and more"])
def test_a_text_without_secrets_is_as_it_was(text):
    assert redacted(text) == text


def test_secrets_are_found_in_every_corner_of_a_config():
    config = {"data": {"root": "https://a:b@c"}, "tags": ["x", ("https://h?sig=1", 3)], "n": 1.5, "none": None}
    assert redacted(config) == {
        "data": {"root": "https://a:***@c"},
        "tags": ["x", ("https://h?sig=***", 3)],
        "n": 1.5,
        "none": None,
    }
    assert config["data"]["root"] == "https://a:b@c"


def test_a_log_holds_no_secret_of_a_traceback():
    formatter = RedactingFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("no answer from https://me:hunter2@host")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 1, "sent %s", ("0123456789abcdef",), (type(error), error, error.__traceback__)
        )
    said = formatter.format(record)
    assert said.startswith("ERROR sent ***")
    assert "https://me:***@host" in said
    assert "hunter2" not in said


# No character that ends a password in an address, and none of the text around it
secrets = st.text(string.ascii_uppercase + string.digits + "%+!$=_.", min_size=8, max_size=60)
around = st.text(string.ascii_lowercase + " \n/", max_size=40)
PLACES = ["https://user:{}@host/", "x://:{}@h", "?token={}", "https://h/?a=1&x_secret={}&b", "&X-Amz-Signature={}"]


@given(secrets, around, around, st.sampled_from(PLACES))
@settings(derandomize=True, deadline=None)
def test_no_planted_secret_survives(secret, before, after, place):
    said = redacted({"at": [f"{before} {place.format(secret)} {after}"]})["at"][0]
    assert secret not in said
    assert said.startswith(before)
    assert said.endswith(after)


@given(secrets, around, around)
@settings(derandomize=True, deadline=None)
def test_no_secret_of_the_environment_survives(secret, before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        assert redacted(before + secret + after) == f"{before}***{after}"


@given(st.text(st.characters(exclude_characters="?&;@", exclude_categories=["Cs"])))
@settings(derandomize=True, deadline=None)
def test_text_without_an_address_is_unchanged(text):
    assert redacted(text) == text
