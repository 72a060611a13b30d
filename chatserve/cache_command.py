"""`chatserve cache`: the cache of a running server, seen and emptied from the command line.

stats   where pages are, hits, what is on its way, the disk; --json for all of it
flush   forget the idle pages in memory; what has a copy on disk is loaded again
"""

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from chatserve.errors import SettingsError
from chatserve.terminal.options import KEY_VARIABLE, URL_DEFAULT, URL_VARIABLE

DESCRIPTION = f"The cache of a running chatserve. An admin's key is read from {KEY_VARIABLE}."
_TIMEOUT_SECONDS = 30.0


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options, with their help."""
    parser.add_argument("action", choices=("stats", "flush"))
    parser.add_argument("--url", help=f"the server (default: {URL_DEFAULT}, or {URL_VARIABLE})")
    parser.add_argument("--json", action="store_true", help="everything, as the server says it")


def run_cache_command(given: argparse.Namespace) -> int:
    """Do it; the exit status. Raises SettingsError where the server cannot be asked."""
    import httpx  # not for `chatserve --help`

    url = given.url or os.environ.get(URL_VARIABLE) or URL_DEFAULT
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS) as client:
            if given.action == "flush":
                answer = client.post("/admin/cache/flush", json={})
            else:
                answer = client.get("/admin/cache")
            body: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise SettingsError(f"{url} cannot be asked: {error}.") from error
    if answer.is_error:
        raise SettingsError(f"{url} refuses: {body.get('error', {}).get('message', body)}")
    if given.json:
        print(json.dumps(body, indent=2))
    elif given.action == "flush":
        device, host = body["pages"], body["host_pages"]
        print(f"{device:,} pages forgotten on the device, {host:,} in host memory")
    else:
        print(table(body))
    return 0


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
