"""The demo page's functions that need no page: the wheel's geometry, and outcomes in words. Run by Node."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
from typing import Any, Final

import msgspec
import pytest

from tests import servers
from tests.gateway.campaigns import GARDEN
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.gateway.campaign_views import view_of
from tombola.producers.gateway.routes.page import PAGE
from tombola.producers.storage.campaigns import CampaignState

pytestmark = [pytest.mark.process, pytest.mark.timeout(servers.INSTALL_TIMEOUT_S + 60)]

SLIVER_DEG: Final = 3.0
RUN_TIMEOUT_S = 60
# As a data: URL, because Node takes a file .js for an older kind of module.
CALLS = """
const [source, calls] = JSON.parse(await new Promise((done) => {
  let text = '';
  process.stdin.on('data', (part) => (text += part)).on('end', () => done(text));
}));
const module = await import(`data:text/javascript,${encodeURIComponent(source)}`);
console.log(JSON.stringify(calls.map(([name, ...values]) => module[name](...values))));
"""


def call(file: str, *calls: list[Any]) -> list[Any]:
    """What the functions of a file return: each call is a name and arguments."""
    node = servers._binary("node", ("nodejs", "npm"))
    done = subprocess.run(
        [node, "--input-type=module", "-e", CALLS],
        input=json.dumps([(PAGE / file).read_text(), calls]),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    returned: list[Any] = json.loads(done.stdout)
    return returned


def prizes(*chances: float) -> list[dict[str, Any]]:
    return [{"code": f"p{number}", "chance": chance} for number, chance in enumerate(chances)]


def widths(segments: list[dict[str, Any]]) -> list[float]:
    return [it["to"] - it["from"] for it in segments]


# ---- the wheel -------------------------------------------------------------------------------------------------------

WHEELS: Final = {
    "default": (0.3, 0.7),
    "a single prize": (1.0,),
    "a phone among many": (0.0001, 0.0999, 0.2, 0.7),
    "weights instead of shares": (1, 999, 2000, 7000),
    "one in 2**32": (1 / 2**32, 1 - 1 / 2**32),
    "all but one tiny": (1e-6, 1e-6, 1e-6, 1 - 3e-6),
    "just below the sliver": (0.0083, 0.0083, 0.9834),
    "made small by the slivers of others": (*[1e-9] * 50, 0.00834, 1.0),
    "a hundred equal ones": (0.01,) * 100,
    "a thousand": tuple(1 / (number + 1) for number in range(1_000)),
    "one that cannot come": (0.0, 1.0),
}


def test_segments_fill_the_wheel_in_the_sizes_of_the_prizes() -> None:
    wheels = call("wheel.js", *[["segmentsOf", prizes(*chances)] for chances in WHEELS.values()])
    for (name, chances), segments in zip(WHEELS.items(), wheels, strict=True):
        assert [it["code"] for it in segments] == [f"p{number}" for number in range(len(chances))], name
        assert (segments[0]["from"], segments[-1]["to"]) == (0, 360), name
        for one, other in itertools.pairwise(segments):
            assert one["to"] == other["from"], name
        least = min(SLIVER_DEG, 360 / (2 * len(chances)))
        found = widths(segments)
        assert min(found) > least - 1e-6, name
        large = [(chance, width) for chance, width in zip(chances, found, strict=True) if width > least + 1e-6]
        assert large, name
        for chance, width in large:  # the others stand to each other as their chances
            assert width / large[0][1] == pytest.approx(chance / large[0][0], rel=1e-6), name


def test_segments_are_exact_where_none_is_tiny() -> None:
    (default, quarters) = call(
        "wheel.js", ["segmentsOf", prizes(0.3, 0.7)], ["segmentsOf", prizes(0.25, 0.25, 0.25, 0.25)]
    )
    assert widths(default) == pytest.approx([108, 252])
    assert widths(quarters) == pytest.approx([90] * 4)


@pytest.mark.parametrize("share", [0, 0.5, 0.999_999])
def test_the_wheel_rests_inside_of_the_segment(share: float) -> None:
    """Turned by the angle, the pointer at the top stands above a point of the segment, off its edges."""
    (segments,) = call("wheel.js", ["segmentsOf", prizes(1, 999, 2000, 7000)])
    rests = call("wheel.js", *[["restOn", segment, share] for segment in segments])
    for segment, rest in zip(segments, rests, strict=True):
        assert 0 <= rest < 360
        under = -rest % 360
        edge = 0.1 * (segment["to"] - segment["from"])
        assert segment["from"] + edge < under < segment["to"] - edge


def test_a_path_goes_round_its_segment() -> None:
    segments = [{"from": 0, "to": 90}, {"from": 90, "to": 350}, {"from": 0, "to": 360}]
    quarter, most, whole = call("wheel.js", *[["pathOf", it, 100] for it in segments])
    assert quarter == "M0 0L0 -100A100 100 0 0 1 100 0Z"
    assert " 0 1 1 " in most  # the long way round
    end = [float(it) for it in re.findall(r"-?[\d.]+", most)][-2:]
    assert end == pytest.approx([100 * math.sin(math.radians(350)), -100 * math.cos(math.radians(350))], abs=1e-3)
    assert whole.count("A") == 2  # an arc that ends where it begins would be none


# ---- outcomes in words -----------------------------------------------------------------------------------------------


def shown(odds: Odds) -> Any:
    """A campaign as the page gets it."""
    return json.loads(msgspec.json.encode(view_of(odds, CampaignState.OPEN)))


def grant(asset_code: str, amount: str, code: str = "") -> dict[str, str]:
    return {"asset_code": asset_code, "amount": amount, "notify": "", "code": code, "idempotency_key": "k:reward"}


TEN = {
    "v": 2,
    "prizes": [
        {"pull": 1, "code": "nothing", "grants": []},
        {"pull": 2, "code": "five", "grants": [grant("POINT", "5.00")]},
        {"pull": 3, "code": "phone", "grants": [grant("ITEM.PHONE", "1.00", "WINTER-0001")]},
        *({"pull": pull, "code": "nothing", "grants": []} for pull in range(4, 11)),
    ],
}


def test_every_pull_of_ten_is_an_outcome() -> None:
    view = shown(manifest.parse(GARDEN))
    (outcomes, unknown) = call("prizes.js", ["outcomesOf", TEN, view], ["outcomesOf", TEN, None])
    assert [(it["pull"], it["name"], it["isPrize"]) for it in outcomes] == [
        (1, "No prize", False),
        (2, "5.00 POINT", True),
        (3, "A phone", True),
        *((pull, "No prize", False) for pull in range(4, 11)),
    ]
    assert outcomes[2]["codes"] == ["WINTER-0001"]
    assert [it["name"] for it in unknown][:3] == ["No prize", "five", "phone"]  # of odds that are gone
    (sentence, rarest, none) = call(
        "prizes.js",
        ["sentenceOf", outcomes],
        ["rarestOf", outcomes, view],
        ["sentenceOf", [it for it in outcomes if not it["isPrize"]]],
    )
    assert sentence == "Won in 2 of 10 pulls"
    assert rarest["code"] == "phone"
    assert none == "No prize in 8 pulls"


@pytest.mark.parametrize(("amount", "said"), [("5.00", "Won 5.00 POINT"), ("0.00", "No prize this time")])
def test_a_result_of_the_built_in_campaign_names_a_prize_of_its_wheel(amount: str, said: str) -> None:
    view = shown(DEFAULT_ODDS)
    (outcomes, on_wheel) = call("prizes.js", ["outcomesOf", {"v": 1, "prize_amount": amount}, view], ["onWheel", view])
    assert outcomes[0]["code"] in [it["code"] for it in on_wheel]
    assert [(it["label"], it["isPrize"]) for it in on_wheel] == [("5", True), ("No prize", False)]
    assert call("prizes.js", ["sentenceOf", outcomes]) == [said]
