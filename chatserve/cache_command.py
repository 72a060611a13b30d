"""`chatserve cache`: the cache of a running server, seen and changed from the command line.

stats   where pages are, hits, what is on its way, the disk; --json for all of it
flush   forget the idle pages in memory; what has a copy on disk is loaded again

verify  read --pages pages of the disk, drawn at random, and forget those that are wrong

Of one conversation, by its id:

lease   for --seconds others' pages leave memory before its own; 0 ends that
warm    bring what is kept of it to the device
evict   forget its idle pages in memory that have a copy on disk (without a disk, all idle ones)
forget  delete it with all that was kept of it, in every tier and in the store, whoever owns it
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from chatserve.errors import SettingsError
from chatserve.terminal.options import KEY_VARIABLE, URL_DEFAULT, URL_VARIABLE

DESCRIPTION = f"The cache of a running chatserve. An admin's key is read from {KEY_VARIABLE}."
_TIMEOUT_SECONDS = 30.0
# Thousands of large pages from a slow disk; a store's large file, written anew after a deletion.
_LONG_SECONDS = 600.0
_LONG = ("forget", "verify")


ACTIONS = ("stats", "flush", "lease", "warm", "evict", "forget", "verify")
_OF_A_CONVERSATION = ("lease", "warm", "evict", "forget")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options, with their help."""
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument(
        "conversation", nargs="?", help=f"its id, for {', '.join(_OF_A_CONVERSATION)}"
    )
    parser.add_argument("--seconds", type=_seconds, help="of a lease; 0 ends it")
    parser.add_argument("--pages", type=int, help="how many verify reads")
    parser.add_argument("--url", help=f"the server (default: {URL_DEFAULT}, or {URL_VARIABLE})")
    parser.add_argument("--json", action="store_true", help="everything, as the server says it")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not math.isfinite(seconds):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return seconds


def run_cache_command(given: argparse.Namespace) -> int:
    """Do it; the exit status. Raises SettingsError where the server cannot be asked."""
    import httpx  # not for `chatserve --help`

    asked = request_of(given)
    url = given.url or os.environ.get(URL_VARIABLE) or URL_DEFAULT
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = _LONG_SECONDS if given.action in _LONG else _TIMEOUT_SECONDS
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout) as client:
            if asked is None:
                answer = client.get("/admin/cache")
            else:
                answer = client.post(f"/admin/cache/{given.action}", json=asked)
            body: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise SettingsError(f"{url} cannot be asked: {error}.") from error
    if answer.is_error:
        raise SettingsError(f"{url} refuses: {body.get('error', {}).get('message', body)}")
    if given.json:
        print(json.dumps(body, indent=2))
    else:
        print(_SAID[given.action](body))
    return 0


def request_of(given: argparse.Namespace) -> dict[str, object] | None:
    """The body to be posted; None for a question. Raises SettingsError for options that do not
    belong together."""
    action = given.action
    fields: dict[str, object] = {
        "conversation": given.conversation,
        "seconds": given.seconds,
        "pages": given.pages,
    }
    takers = {"conversation": _OF_A_CONVERSATION, "seconds": ("lease",), "pages": ("verify",)}
    words = {"conversation": "conversation's id", "seconds": "--seconds", "pages": "--pages"}
    for name, value in fields.items():
        if (value is not None) != (action in takers[name]):
            takes = words[name] if value is None else f"no {words[name]}"
            raise SettingsError(f"chatserve cache {action} takes {takes}.")
    if action == "stats":
        return None
    return {name: value for name, value in fields.items() if value is not None}


def table(body: Mapping[str, Any]) -> str:
    """The figures that one looks for, a line each."""
    cache, engine, disk = body.get("cache"), body.get("engine"), body.get("disk")
    if cache is None or engine is None:
        return "the model is loading"
    pages, transit, tiers = cache["pages"], cache["transit"], engine["tiers"]
    in_use = pages["total"] - pages["free"] - pages["cached"]
    queries = cache["query_tokens"]
    rows = [
        ("device", f"{pages['total']:,} pages of {cache['page_size']} tokens"),
        ("", f"{in_use:,} in use, {pages['cached']:,} idle, {pages['free']:,} free"),
        ("shared", f"{cache['logical_pages']:,} owners of {cache['physical_pages']:,} pages"),
        ("prompts", f"{queries:,} tokens, {_share(cache['hit_tokens'], queries)} found"),
        ("evicted", f"{cache['evicted_for_space_total']:,}, {transit['lost_total']:,} uncopied"),
    ]
    if disk is None or not disk["slabs"]:
        rows.append(("disk", "none, or not open yet"))
    else:
        slab = disk["slabs"][0]
        size, capacity = disk["bytes"] / 2**20, disk["capacity_bytes"] / 2**20
        rows += [
            ("disk", f"{slab['pages']:,} pages, {size:,.1f} of {capacity:,.0f} MiB"),
            ("", f"{transit['loaded_total']:,} loaded, {transit['failed_total']:,} not there"),
            ("", f"{transit['kept_total']:,} written, {transit['unkept']:,} waiting"),
            ("state", disk_state(slab)),
        ]
    load, compute = tiers["load_page_seconds"], tiers["compute_token_seconds"]
    if load is not None:
        rows.append(("loading", f"{1e3 * load:.3f} ms a page"))
    if compute is not None:
        rows.append(("computing", f"{1e3 * compute * cache['page_size']:.3f} ms a page"))
    return "\n".join(f"{name:10}{text}" for name, text in rows)


def disk_state(slab: Mapping[str, Any]) -> str:
    """In order, or why not."""
    return "in order" if slab["degraded"] is None else f"degraded: {slab['degraded']}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _flushed(body: Mapping[str, Any]) -> str:
    device, host = body["pages"], body["host_pages"]
    return f"{device:,} pages forgotten on the device, {host:,} in host memory"


def _leased(body: Mapping[str, Any]) -> str:
    return f"the lease is set for {body['pages']:,} pages of the device, {_host(body)}"


def _warmed(body: Mapping[str, Any]) -> str:
    said = f"{body['device']:,} pages on the device, {body['coming']:,} on the way there"
    return f"{said}, {body['below']:,} left below, {body['nowhere']:,} nowhere"


def _evicted(body: Mapping[str, Any]) -> str:
    stayed = body["pages_stayed"] + body["host_pages_stayed"]
    return f"{body['pages']:,} pages left the device, {_host(body)}; {stayed:,} stayed"


def _forgotten(body: Mapping[str, Any]) -> str:
    return f"{body['conversations']} conversation forgotten: nothing of it is kept"


def _verified(body: Mapping[str, Any]) -> str:
    bad = f"{body['wrong']:,} wrong, {body['unreadable']:,} unreadable"
    compared = f"{body['compared']:,} compared with the device's, {body['different']:,} different"
    return f"{body['checked']:,} pages checked: {bad}; {compared}"


def _host(body: Mapping[str, Any]) -> str:
    return f"{body['host_pages']:,} of host memory"


_SAID: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "stats": table,
    "flush": _flushed,
    "lease": _leased,
    "warm": _warmed,
    "evict": _evicted,
    "forget": _forgotten,
    "verify": _verified,
}
