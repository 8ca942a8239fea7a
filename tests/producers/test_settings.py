"""Settings: every mistake is told by its variable's name, no secret is ever told, each variable has its purpose."""

import json
import logging
import pickle
import traceback

import pytest

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.settings import HOME_VARIABLE, PREFIX, Settings

# Each holds the word `hunter2`, which must not come out again.
SECRETS = {
    "TOMBOLA_DATABASE_URL": "mysql+pymysql://me:hunter2@db.example/tombola",
    "TOMBOLA_BROKER_URL": "amqps://me:hunter2@mq.example/",
    "TOMBOLA_RESULT_URL": "rediss://:hunter2@cache.example/0",
}
WRONG = "gopher://me:hunter2@h/d"  # apart, as a traceback quotes the line that raised
SEED = "c0ffee" * 8


def from_env(**env: str) -> Settings:
    return Settings.from_env({PREFIX + name.upper(): value for name, value in env.items()})


def refusal(**env: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        from_env(**env)
    return str(refused.value)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_without_any_variable_the_defaults_hold() -> None:
    settings = Settings.from_env({})
    assert (settings.batch_size_max, settings.tries_max, settings.remote_control) == (800, 3, None)
    assert settings.claim_after_s > settings.batch_time_s_max


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMBOLA_LANES", "5")
    assert Settings.from_env().lanes == 5
    # an empty mapping is one, too
    assert Settings.from_env({}).lanes != 5


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TOMBOLA_DATABSE_URL", "TOMBOLA_DATABASE_URL"),
        ("TOMBOLA_DB_URL", "TOMBOLA_BROKER_URL|TOMBOLA_DATABASE_URL|TOMBOLA_RESULT_URL"),
        ("TOMBOLA_LANE", "TOMBOLA_LANES"),
        ("TOMBOLA_lanes", "TOMBOLA_LANES"),
        ("TOMBOLA_LANES ", "TOMBOLA_LANES"),
        ("TOMBOLA_BATCH_SIZE", "TOMBOLA_BATCH_SIZE_MAX"),
    ],
)
def test_a_misspelt_name_is_an_error_that_says_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"unknown setting {name}; did you mean ({meant})\?"):
        Settings.from_env({name: "1"})


def test_a_name_like_no_other_gets_the_list_not_a_guess() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting TOMBOLA_FOO; known are") as refused:
        Settings.from_env({"TOMBOLA_FOO": "1"})
    assert all(PREFIX + name.upper() in str(refused.value) for name in Settings.model_fields)


def test_an_unknown_names_value_is_not_told() -> None:
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env({"TOMBOLA_SEDE": SEED})
    assert SEED not in str(refused.value)


def test_other_programs_variables_are_not_ours() -> None:
    assert Settings.from_env({"PATH": "/bin", "TOMBOLAS": "x", "DATABASE_URL": "x", HOME_VARIABLE: "/x"})


def service_links(name: str, address: str = "10.0.0.11", *ports: tuple[str, int]) -> dict[str, str]:
    """What a kubelet puts into every container for a Service (pkg/kubelet/envvars); `ports` are named."""
    prefix = name.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    ports = ports or (("http", 8000),)
    links = {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": str(ports[0][1]),
        f"{prefix}_PORT": f"tcp://{host}:{ports[0][1]}",
    }
    for port_name, port in ports:
        each = f"{prefix}_PORT_{port}_TCP"
        links |= {
            f"{prefix}_SERVICE_PORT_{port_name.upper().replace('-', '_')}": str(port),
            each: f"tcp://{host}:{port}",
            f"{each}_PROTO": "tcp",
            f"{each}_PORT": str(port),
            f"{each}_ADDR": address,
        }
    return links


@pytest.mark.parametrize(
    "links",
    [
        service_links("tombola"),
        service_links("tombola", "fd00:10:96::b", ("http", 8000), ("metrics-2", 9090)),
        service_links("tombola-gateway"),
        service_links("tombola-metrics", "10.0.0.12", ("prometheus", 9090)),  # one has the name of a setting
        service_links("tombola-database") | service_links("tombola-console"),
    ],
    ids=["tombola", "ipv6", "gateway", "metrics", "two"],
)
def test_what_kubernetes_says_of_services_is_no_setting(links: dict[str, str]) -> None:
    for alone in ({name: value} for name, value in links.items()):
        assert Settings.from_env(alone) == Settings.from_env({})
    settings = Settings.from_env(links | {"TOMBOLA_LANES": "5"})
    assert (settings.lanes, settings.metrics_port) == (5, 0)


def test_a_port_that_somebody_sets_is_a_setting_whatever_services_there_are() -> None:
    # A container's own variable takes the place of the link of that name.
    links = service_links("tombola-metrics", "10.0.0.12", ("prometheus", 9090))
    assert Settings.from_env(links | {"TOMBOLA_METRICS_PORT": "9091"}).metrics_port == 9091


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOMBOLA_PORT", "8000"),
        ("TOMBOLA_PORT", "tcp://db.example:3306"),
        ("TOMBOLA_SERVICE_HOST", "db.example"),
        ("TOMBOLA_SERVICE_PORT", "http"),
        ("TOMBOLA_PORT_8000_TCP_PROTO", "TCP"),
        ("TOMBOLA_PORT_8000_TCP_ADDRESS", "10.0.0.11"),
        ("TOMBOLA_METRIC_PORT", "9090"),
        ("TOMBOLA_SEED_PORT_8000_TCP", SEED),
        ("TOMBOLA_BROKER", "tcp://10.0.0.11:6379"),
    ],
)
def test_a_misspelt_setting_is_no_link_of_a_service(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown setting {name};") as refused:
        Settings.from_env({name: value})
    assert value not in str(refused.value).removeprefix(f"unknown setting {name};")


@pytest.mark.parametrize("value", ["tcp://db.example:9090", "tcp://10.0.0.11", "http://10.0.0.11:9090", ""])
def test_a_setting_that_is_no_link_is_checked_as_ever(value: str) -> None:
    assert refusal(metrics_port=value).startswith("TOMBOLA_METRICS_PORT: ")


# ---- values ----------------------------------------------------------------------------------------------------------

EDGES = {
    "batch_size_max": ("1", "900", "0", "901"),
    "lock_wait_s": ("1", "50", "0", "51"),
    "tries_max": ("1", "20", "0", "21"),
    "deliveries_max": ("1", "1000", "0", "1001"),
    "lanes": ("1", "16", "0", "17"),
    "result_ttl_s": ("1", "31536000", "0", "-1"),
    "publish_timeout_s": ("0.1", "300", "0", "300.1"),
    "claim_after_s": ("15", "3600", "0", "3600.1"),
    "relay_after_s": ("0.1", "3600", "0", "3600.1"),
    "relay_tries_max": ("1", "100", "0", "101"),
    "request_timeout_s": ("0.1", "31536000", "0", "31536001"),
    "seed_reveal_after_s": ("60", "31536000", "59.9", "31536001"),
    "webhook_tries_max": ("1", "100", "0", "101"),
    "webhook_timeout_s": ("0.1", "60", "0", "60.1"),
    "retention_days": ("0", "36500", "-1", "36501"),
    "seal_after_s": ("1", "86400", "0", "86401"),
    "books_anchor_every_s": ("1", "86400", "0", "86401"),
    "gateway_rate_max": ("1", "1000000", "0", "1000001"),
    "gateway_connections_max": ("1", "60000", "0", "60001"),
    "backlog_max": ("1", "100000000", "0", "100000001"),
    "metrics_port": ("0", "65535", "-1", "65536"),
}


@pytest.mark.parametrize(("name", "edges"), EDGES.items(), ids=EDGES)
def test_values_are_held_in_their_range(name: str, edges: tuple[str, str, str, str]) -> None:
    lowest, highest, below, above = edges
    for fits in (lowest, highest):
        # so long that it does not matter how long a batch takes
        assert getattr(from_env(**{"claim_after_s": "3600", name: fits}), name) == float(fits)
    for out in (below, above):
        assert refusal(**{name: out}).startswith(f"TOMBOLA_{name.upper()}: ")


def test_every_number_has_its_range_tested() -> None:
    numbers = {name for name, field in Settings.model_fields.items() if field.annotation in (int, float)}
    assert numbers == set(EDGES)


@pytest.mark.parametrize("value", ["", "x", "2.5", "nan", "inf", "1e400", "0x2"])
def test_what_is_no_number_is_told_by_its_name(value: str) -> None:
    assert refusal(lanes=value).startswith("TOMBOLA_LANES: ")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "soon"])
def test_a_time_without_end_is_refused(value: str) -> None:
    assert refusal(claim_after_s=value).startswith("TOMBOLA_CLAIM_AFTER_S: ")
    assert refusal(publish_timeout_s=value).startswith("TOMBOLA_PUBLISH_TIMEOUT_S: ")
    assert refusal(relay_after_s=value).startswith("TOMBOLA_RELAY_AFTER_S: ")
    assert refusal(request_timeout_s=value).startswith("TOMBOLA_REQUEST_TIMEOUT_S: ")
    assert refusal(retention_days=value).startswith("TOMBOLA_RETENTION_DAYS: ")


SWITCHES = ("remote_control", "idempotency_key_required", "gateway_page", "accepted_only", "webhook_private")


@pytest.mark.parametrize(
    ("value", "meant"), [("1", True), ("true", True), ("0", False), ("false", False), ("off", False)]
)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off(name: str, value: str, meant: bool) -> None:
    assert getattr(from_env(**{name: value}), name) is meant
    assert refusal(**{name: "perhaps"}).startswith(f"TOMBOLA_{name.upper()}: ")


def test_remote_control_is_off_with_rabbitmq_unless_it_is_asked_for() -> None:
    assert from_env(broker_url="redis://h/0").has_remote_control
    assert not from_env(broker_url="amqp://h//").has_remote_control
    assert from_env(broker_url="amqp://h//", remote_control="true").has_remote_control
    assert not from_env(broker_url="redis://h/0", remote_control="false").has_remote_control


def test_every_switch_is_tested() -> None:
    switches = {name for name, field in Settings.model_fields.items() if field.annotation in (bool, bool | None)}
    assert switches == set(SWITCHES)


def test_the_gateway_is_closed_unless_it_is_opened_in_so_many_words() -> None:
    assert Settings.from_env({}).gateway_auth == "api-key"
    assert from_env(gateway_auth="none").gateway_auth == "none"
    for wrong in ("", "None", "no", "api_key", "off"):
        assert refusal(gateway_auth=wrong).startswith("TOMBOLA_GATEWAY_AUTH: ")


def test_all_mistakes_are_told_at_once() -> None:
    told = refusal(lanes="0", tries_max="x", seed="short")
    assert all(name in told for name in ("TOMBOLA_LANES", "TOMBOLA_TRIES_MAX", "TOMBOLA_SEED"))
    assert "\n" not in told


# ---- values that must fit together -----------------------------------------------------------------------------------


def test_draws_are_not_taken_over_while_their_batch_may_still_run() -> None:
    told = refusal(claim_after_s="6")
    assert all(name in told for name in ("TOMBOLA_CLAIM_AFTER_S", "TOMBOLA_LOCK_WAIT_S", "TOMBOLA_TRIES_MAX"))
    assert from_env(claim_after_s="6.1").claim_after_s == 6.1
    # the other two lengthen a batch as well
    assert "TOMBOLA_CLAIM_AFTER_S" in refusal(lock_wait_s="3")
    assert "TOMBOLA_CLAIM_AFTER_S" in refusal(tries_max="20")


# ---- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("mysql://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ("mariadb://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ("mariadb+pymysql://u:p@h/d", "mysql+pymysql://u:p@h/d"),
        ("mysql+pymysql://u:p%40%3A%2F@h:3307/d?ssl_ca=x", "mysql+pymysql://u:p%40%3A%2F@h:3307/d?ssl_ca=x"),
        ("sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
        ("sqlite:///x.db", "sqlite:///x.db"),
    ],
)
def test_both_databases_are_taken_by_their_usual_names(given: str, used: str) -> None:
    assert from_env(database_url=given).need("database_url") == used


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "postgresql://u:hunter2@h/d",
        "mysql+aiomysql://u:hunter2@h/d",
        "mysql+pymysql://u:hunter2@h",  # no database
        "mysql+pymysql://u:hun@ter:hunter2/d",  # an unquoted @ makes the password's end a port
        "sqlite://",
        "sqlite:///:memory:",
    ],
)
def test_a_database_that_cannot_serve_is_refused(url: str) -> None:
    told = refusal(database_url=url)
    assert told.startswith("TOMBOLA_DATABASE_URL: ")
    assert "hunter2" not in told


@pytest.mark.parametrize("url", ["http://:hunter2@h", "hunter2", "redis:hunter2", "sentinel://:hunter2@h", "kafka://h"])
def test_a_broker_is_redis_or_rabbitmq(url: str) -> None:
    told = refusal(broker_url=url)
    assert told.startswith("TOMBOLA_BROKER_URL: must begin with redis:// or rediss:// or amqp:// or amqps://")
    assert "hunter2" not in told
    for scheme in ("redis", "rediss", "amqp", "amqps"):
        assert from_env(broker_url=f"{scheme}://h").has("broker_url")


def test_results_are_kept_in_redis() -> None:
    assert refusal(result_url="amqp://:hunter2@h").startswith("TOMBOLA_RESULT_URL: must begin with redis://")
    assert from_env(broker_url="redis://b", result_url="redis://r").need("result_url") == "redis://r"
    # by default where the broker is, if that can keep results
    assert from_env(broker_url="redis://b").need("result_url") == "redis://b"
    assert from_env(broker_url="rediss://b").need("result_url") == "rediss://b"
    with pytest.raises(ConfigurationError, match="TOMBOLA_RESULT_URL is not set"):
        from_env(broker_url="amqp://b").need("result_url")
    assert not from_env(broker_url="amqp://b").has("result_url")


def test_what_is_needed_and_not_set_is_told_with_its_purpose() -> None:
    settings = Settings.from_env({})
    for name in ("database_url", "broker_url", "result_url", "seed"):
        assert not settings.has(name)
        with pytest.raises(ConfigurationError, match=f"TOMBOLA_{name.upper()} is not set: .{{20}}"):
            settings.need(name)


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_lists_have_commas_between_their_parts() -> None:
    settings = from_env(
        trusted_proxies="10.0.0.0/8, 192.0.2.7,2001:db8::/32",
        allowed_hosts=" Shop.example,*.shop.example, [::1]",
        cors_origins="https://shop.example,http://localhost:3000",
    )
    assert [str(it) for it in settings.trusted_proxies] == ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"]
    assert settings.allowed_hosts == ("shop.example", "*.shop.example", "[::1]")
    assert settings.cors_origins == ("https://shop.example", "http://localhost:3000")
    for name in ("trusted_proxies", "allowed_hosts", "cors_origins"):
        assert getattr(from_env(**{name: ""}), name) == getattr(Settings.from_env({}), name) == ()
        assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("trusted_proxies", it) for it in ("proxy", "10.0.0.1/8", "10.0.0.0/33", "*", "1.2.3.4 5.6.7.8")),
        *(
            ("allowed_hosts", it)
            for it in ("https://shop.example", "shop.example:80", "a/b", "a b", "*", "::1", "a*.b")
        ),
        *(("cors_origins", it) for it in ("shop.example", "https://", "https://a/", "ftp://a", "null", "https://*.a")),
    ],
)
def test_a_part_that_is_none_is_told(name: str, wrong: str) -> None:
    told = refusal(**{name: f"{wrong},"})
    assert told.startswith(f"TOMBOLA_{name.upper()}")
    assert wrong in told


# ---- the seed --------------------------------------------------------------------------------------------------------


def test_the_seed_is_hexadecimal_and_long_enough() -> None:
    assert from_env(seed=SEED).seed_bytes == bytes.fromhex(SEED)
    assert from_env(seed="00" * 16).seed_bytes == bytes(16)
    for wrong in ("00" * 15, "c0ffe" * 8 + "0", "g" * 32, "secret words that are long enough", "0x" + "00" * 16):
        told = refusal(seed=wrong)
        assert told.startswith("TOMBOLA_SEED: at least 32 hex digits")
        assert wrong not in told
    with pytest.raises(ConfigurationError, match="TOMBOLA_SEED is not set"):
        _ = Settings.from_env({}).seed_bytes


def test_several_seeds_the_newest_first() -> None:
    newest = "0123" * 16
    settings = from_env(seed=f"{newest}, {SEED}")
    assert settings.seeds == (bytes.fromhex(newest), bytes.fromhex(SEED))
    assert settings.seed_bytes == bytes.fromhex(newest)
    assert Settings.from_env({}).seeds == ()
    assert SEED not in refusal(seed=f"{SEED},short")


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_shows(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings.from_env(SECRETS | {"TOMBOLA_SEED": SEED})
    assert "hunter2" in settings.need("database_url")
    logging.getLogger("test").warning("%s %r", settings, settings)
    shown = [repr(settings), str(settings), f"{settings}", settings.model_dump_json(), str(settings.model_dump())]
    shown += [caplog.text, repr(vars(settings)), json.dumps(settings.model_dump(mode="json"))]
    for text in shown:
        assert "hunter2" not in text
        assert SEED not in text


def test_every_secret_is_kept_as_one() -> None:
    settings = Settings.from_env(SECRETS | {"TOMBOLA_SEED": SEED})
    for name in ("database_url", "broker_url", "result_url", "seed"):
        assert str(getattr(settings, name)) == "**********"


@pytest.mark.parametrize("broken", [{"lanes": "0"}, {"claim_after_s": "1"}, {"nonsense": "1"}])
def test_no_secret_shows_when_another_setting_is_wrong(broken: dict[str, str]) -> None:
    env = SECRETS | {"TOMBOLA_SEED": SEED} | {PREFIX + name.upper(): value for name, value in broken.items()}
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env(env)
    # as a log would print it, with its causes
    told = "".join(traceback.format_exception(refused.value))
    assert "hunter2" not in told
    assert SEED not in told


@pytest.mark.parametrize("name", [*SECRETS, "TOMBOLA_SEED"])
def test_a_wrong_secret_is_not_repeated(name: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_env({name: WRONG})
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_settings_do_not_change_but_travel_to_other_processes() -> None:
    settings = Settings.from_env({"TOMBOLA_SEED": SEED})
    with pytest.raises(ValueError, match="frozen"):
        settings.lanes = 3
    assert pickle.loads(pickle.dumps(settings)) == settings


# ---- documentation ---------------------------------------------------------------------------------------------------


def test_every_setting_says_what_it_is_for() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
