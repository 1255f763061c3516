"""No password or signature of a URL is shown, and what is shown still says which object it is."""

import pytest

from serve.contract.urls import is_remote, join_url, redact, split_credentials, unsigned, url_path


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("https://user:pa@ss@host/x.jpg", "https://***@host/x.jpg", "https://host/x.jpg"),
        ("https://TOKEN@host/x.jpg", "https://***@host/x.jpg", "https://host/x.jpg"),
        ("postgresql://u:pa/s?s#@db:5432/m", "postgresql://***@db:5432/m", "postgresql://db:5432/m"),
        (
            "https://b/cat.jpg?X-Amz-Algorithm=A&X-Amz-Credential=AK%2F2026&X-Amz-Date=2&X-Amz-Signature=ab",
            "https://b/cat.jpg?***",
            "https://b/cat.jpg",
        ),
        ("https://b/cat.jpg?x%2Damz%2Dsignature=ab", "https://b/cat.jpg?***", "https://b/cat.jpg"),
        ("https://b/c.jpg?X-Goog-Signature=ab&generation=3", "https://b/c.jpg?generation=3&***", None),
        ("https://b/c.jpg?sv=1&se=2&sp=r&sig=a%2Bb%3D", "https://b/c.jpg?***", "https://b/c.jpg"),
        ("https://b/c.jpg?Expires=1&Signature=x~&Key-Pair-Id=K", "https://b/c.jpg?***", "https://b/c.jpg"),
        (
            "https://b/c.jpg?AWSAccessKeyId=A&Signature=x&Expires=1",
            "https://b/c.jpg?***",
            "https://b/c.jpg",
        ),
        ("https://b/get?id=3&token=abc&w=4", "https://b/get?id=3&w=4&***", "https://b/get?id=3&w=4"),
        ("https://b/c.jpg?api_key=abc", "https://b/c.jpg?***", "https://b/c.jpg"),
        ("https://b/c.jpg#access_token=abc", "https://b/c.jpg#***", "https://b/c.jpg"),
        (
            "https://p/resize?src=https%3A%2F%2Fu%3Apw%40h%2Fx.jpg%3Fsig%3D1&w=3",
            "https://p/resize?src=https%3A%2F%2F***%40h%2Fx.jpg%3F***&w=3",
            "https://p/resize?src=https%3A%2F%2Fh%2Fx.jpg&w=3",
        ),
    ],
)
def test_secrets_are_left_out_and_the_object_stays_known(url: str, shown: str, name: str | None) -> None:
    assert redact(url) == shown
    if name is not None:
        assert redact(url, hidden="") == name


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a@2x.jpg",
        "http://[::1]:5000/a:b@c.jpg",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/p/a@2x.jpg",
        "https://host/x?author=me&sigma=3&sv=1&page=2&q=a%20b",
        "https://host/get?key=photos/1.jpg",
        "photos/what? a=b #1.jpg",
        "sqlite:////data/user@host/mlflow.db",
        "abfss://photos@account.dfs.core.windows.net/cat.jpg",  # two containers are two data sets
        "wasb://photos@account.blob.core.windows.net/cat.jpg",
        "https://b.oss-cn-hangzhou.aliyuncs.com/c.jpg?x-oss-process=image/resize,w_100",
    ],
)
def test_ordinary_names_stay_as_they_are(text: str) -> None:
    assert redact(text) == redact(text, hidden="") == text


def test_in_a_message_every_url_is_redacted_and_the_sentence_stays() -> None:
    said = "403, url='https://h/x?sig=1', then https://u:p@h/y: refused; url: /api/x?token=abc (attempt 4)"
    assert redact(ValueError(said)) == (
        "403, url='https://h/x?***', then https://***@h/y: refused; url: /api/x?*** (attempt 4)"
    )


def test_two_signings_of_one_object_are_the_same_and_two_tokens_are_not() -> None:
    first, second = (f"https://b/x.jpg?id=1&X-Amz-Date={n}&X-Amz-Signature={n}" for n in "12")
    assert unsigned(first) == unsigned(second) == "https://b/x.jpg?id=1"
    assert unsigned("https://b/get?token=1") != unsigned("https://b/get?token=2")


def test_the_kind_of_a_file_is_found_by_its_path() -> None:
    assert url_path("https://b/s.tar?X-Amz-Signature=a.txt") == "https://b/s.tar"
    assert url_path("s3://b/what?.tar") == "s3://b/what?.tar"
    assert url_path("a#b?.txt") == "a#b?.txt"


def test_credentials_are_taken_from_an_address() -> None:
    assert split_credentials("http://u%40x:p%2Fw@h:5000/a") == ("http://h:5000/a", "u@x", "p/w")
    assert split_credentials("http://h:5000") == ("http://h:5000", "", "")


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("x.png", "s3://b/in/x.png"),
        ("./a//x.png", "s3://b/in/a//x.png"),
        ("../x.png", "s3://b/x.png"),
        ("../../../x.png", "s3://b/x.png"),
        ("/x.png", "s3://b/in/x.png"),
    ],
)
def test_names_in_a_list_are_below_its_folder(name: str, url: str) -> None:
    assert join_url("s3://b/in", name) == url


def test_a_url_has_a_scheme() -> None:
    for url in (
        "s3://b",
        "abfs://c@account.dfs.core.windows.net/x",
        "file:///x",
        "HTTPS://h",
        "git+ssh://h",
    ):
        assert is_remote(url)
    for path in ("a.png", "/a/b", "c:/x", "http:/x", "a b://c", "./s3://b", "://x", ""):
        assert not is_remote(path)
