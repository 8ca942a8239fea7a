"""Opening a connection to a server costs no walk through the system's certificates."""

import ssl
from typing import Any

import pytest

from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.mysql_connections import SoonOpened

URL = "mysql+pymysql://nobody@127.0.0.1:1/nothing"


def made_for(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The connection that an engine makes for `url`, not connected."""
    monkeypatch.setattr(SoonOpened, "connect", lambda *_: None)
    engine = open_engine(url)
    arguments, keywords = engine.dialect.create_connect_args(engine.url)
    return SoonOpened(*arguments, **keywords)


def test_without_tls_options_it_encrypts_where_it_can_and_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made_for(URL, monkeypatch), made_for(URL, monkeypatch)
    assert first.ssl
    assert not first._ssl_required
    assert first.ctx is second.ctx
    assert (first.ctx.verify_mode, first.ctx.check_hostname) == (ssl.CERT_NONE, False)
    assert first.ctx.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert first.ctx.cert_store_stats()["x509"] == 0


def test_with_a_ca_every_certificate_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = ssl.get_default_verify_paths().cafile
    if ca is None:
        pytest.skip("this machine has no certificates")
    checked = made_for(f"{URL}?ssl_ca={ca}", monkeypatch)
    assert checked._ssl_required
    assert checked.ctx.verify_mode == ssl.CERT_REQUIRED


def test_our_engines_connect_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(SoonOpened, "connect", lambda self, *_: opened.append(self))
    engine = open_engine(URL)
    with pytest.raises(Exception):  # noqa: B017, PT011 - nobody is there: how it fails is not the point
        engine.connect()
    assert len(opened) == 1
