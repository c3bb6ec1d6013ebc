"""Tell somebody when a regression fails or cannot be measured: Prefect automations that call a web address.

`notify(url)` may be run as often as one likes: block and automation are found by name and brought up to date.
The address is kept in a Prefect block, encrypted, and appears in no log. What is sent is one JSON object,
`{"text": …}`, as Slack, Mattermost and most chat systems take it, and `verdict`, `base`, `candidate`, `file`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_client
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore

EVENTS = frozenset({"eugen.regression.fail", "eugen.regression.void"})
"""A void run is told too: an alarm that cannot ring must not look like silence."""
BLOCK = "eugen-notify"
FAILED, CRASHED = "eugen: tell of a failed regression", "eugen: tell of a killed nightly regression"
_BODY = """{
"text": {{ event.payload.message | tojson }},
"verdict": {{ event.payload.verdict | tojson }},
"base": {{ event.payload.base | tojson }},
"candidate": {{ event.payload.candidate | tojson }},
"file": {{ event.payload.file | tojson }}
}"""
_CRASHED = (
    """{"text": "regression void: a nightly run was killed, nothing was measured", "verdict": "void"}"""
)


def notify(url: str) -> None:
    """Have the Prefect server of PREFECT_API_URL post to `url` at each event of `EVENTS`, and at each crash.

    Raises ValueError for something that is no web address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("notify: the address must begin with http:// or https:// and name a host")
    hook = Webhook.model_validate(
        {"method": "POST", "url": url, "headers": {"Content-Type": "application/json"}}
    )
    block = hook.save(BLOCK, overwrite=True)
    assert isinstance(block, UUID), "the synchronous call answers at once"
    nightly = {"prefect.resource.role": "deployment", "prefect.resource.name": "nightly"}
    crashed = {"expect": {"prefect.flow-run.Crashed"}, "match_related": nightly}
    with get_client(sync_client=True) as client:
        _put(client, _automation(FAILED, {"expect": EVENTS}, block, _BODY))
        _put(client, _automation(CRASHED, crashed, block, _CRASHED))


def _automation(name: str, when: dict[str, Any], block: UUID, body: str) -> AutomationCore:
    return AutomationCore.model_validate(
        {
            "name": name,
            "description": "Made by flows/operate/notify.py",
            "trigger": {"type": "event", "posture": "Reactive", "threshold": 1, "within": 0} | when,
            "actions": [{"type": "call-webhook", "block_document_id": block, "payload": body}],
        }
    )


def _put(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create the automation, or bring the one of this name up to date; more of them would ring twice."""
    present, *twins = client.read_automations_by_name(wanted.name) or [None]
    if present is None:
        client.create_automation(wanted)
    else:
        client.update_automation(present.id, wanted)
    for twin in twins:
        if twin is not None:
            client.delete_automation(twin.id)
