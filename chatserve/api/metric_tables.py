"""Which figure of which floor is which metric, with vLLM's meanings where vLLM has the metric.

Rows name fields of frozen statistics; a field that is not there is left out.
"""

from collections.abc import Mapping

from chatserve.api.exposition import Family, Metric, Sample, families

ENGINE_METRICS = (
    Metric(
        "running", "chatserve_num_requests_running", "gauge", "Sequences that steps compute now."
    ),
    Metric("waiting", "chatserve_num_requests_waiting", "gauge", "Sequences that wait for a step."),
    Metric(
        "following",
        "chatserve_num_requests_following",
        "gauge",
        "Sequences that wait for another one to compute their common prefix.",
    ),
    Metric("in_flight", "chatserve_steps_in_flight", "gauge", "Steps ordered and not committed."),
    Metric("budget_tokens", "chatserve_step_budget_tokens", "gauge", "The next step's budget."),
    Metric("steps_total", "chatserve_steps_total", "counter", "Steps that gave a result."),
    Metric("step_tokens_total", "chatserve_step_tokens_total", "counter", "Tokens of all steps."),
    Metric("step_seconds", "chatserve_step_seconds", "histogram", "How long a step takes."),
    Metric(
        "prompt_tokens_total",
        "chatserve_prefill_tokens_total",
        "counter",
        "Prompt tokens computed; those found in the cache are not.",
    ),
    Metric(
        "generated_tokens_total",
        "chatserve_generation_tokens_total",
        "counter",
        "Tokens generated.",
    ),
    Metric(
        "preemptions_total",
        "chatserve_num_preemptions_total",
        "counter",
        "Times a running sequence had to give its pages back.",
    ),
    Metric("drafts", "chatserve_drafts", "gauge", "Drafts that are not all computed yet."),
    Metric(
        "draft_tokens_total",
        "chatserve_draft_tokens_total",
        "counter",
        "Tokens computed ahead of any request.",
    ),
    Metric("failed_steps_total", "chatserve_failed_steps_total", "counter", "Steps that raised."),
    Metric(
        "io_faults_total",
        "chatserve_io_faults_total",
        "counter",
        "Parts of copies to and from the disk that ended with an exception, a fault of ours.",
    ),
    Metric(
        "keep_processor_seconds_total",
        "chatserve_keep_processor_seconds_total",
        "counter",
        "Processor time that threads have taken to copy pages to the disk.",
    ),
    Metric(
        "recoveries_total",
        "chatserve_recoveries_total",
        "counter",
        "Times the engine went on after a failed step.",
    ),
    Metric(
        "quarantined", "chatserve_quarantined", "gauge", "Inputs refused because they broke steps."
    ),
    Metric(
        "finished_total",
        "chatserve_sequences_finished_total",
        "counter",
        "Sequences by their end in the engine.",
        label="finished_reason",
    ),
)

PAGE_STATES = ("free", "open", "loading", "sealed", "cached", "leaving")

CACHE_METRICS = (
    Metric(
        "pages",
        "chatserve_pages",
        "gauge",
        "Device pages by state.",
        label="state",
        parts=tuple((state, state) for state in PAGE_STATES),
    ),
    Metric(
        "query_tokens",
        "chatserve_prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
    ),
    Metric(
        "hit_tokens",
        "chatserve_prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
    ),
    Metric("named_pages", "chatserve_named_pages", "gauge", "Pages that a prefix can be found in."),
    Metric("logical_pages", "chatserve_logical_pages", "gauge", "Owned pages, once per owner."),
    Metric("physical_pages", "chatserve_physical_pages", "gauge", "Owned pages, each once."),
    Metric("sealed_total", "chatserve_pages_sealed_total", "counter", "Pages filled and named."),
    Metric(
        "copies_total", "chatserve_page_copies_total", "counter", "Partial pages copied at a write."
    ),
    Metric(
        "",
        "chatserve_page_evictions_total",
        "counter",
        "Cached pages given up.",
        label="reason",
        parts=(
            ("evicted_for_space_total", "space"),
            ("evicted_by_flush_total", "flush"),
            ("evicted_by_age_total", "age"),
            ("evicted_by_name_total", "name"),
        ),
    ),
    Metric(
        "leased_pages",
        "chatserve_leased_pages",
        "gauge",
        "Pages of the device that others leave before, for now.",
    ),
    Metric(
        "draft_pages",
        "chatserve_draft_pages",
        "gauge",
        "Pages computed ahead that no request has taken yet.",
    ),
    Metric(
        "draft_adopted_total",
        "chatserve_draft_pages_adopted_total",
        "counter",
        "Pages computed ahead that a request took.",
    ),
    Metric(
        "claims",
        "chatserve_claims",
        "gauge",
        "Prefix names that are being computed, and sequences that wait for them.",
        label="kind",
        parts=(("claimed", "claimed"), ("waiting", "waiting")),
    ),
)


CONVERSATION_METRICS = (
    Metric("running", "chatserve_chat_replies_running", "gauge", "Chats' replies under way."),
    Metric(
        "waiting",
        "chatserve_accepted_waiting",
        "gauge",
        "Requests and turns that are accepted and not yet in the engine's queue.",
    ),
    Metric("accepted_total", "chatserve_turns_accepted_total", "counter", "New turns kept."),
    Metric(
        "resumed_total",
        "chatserve_chat_replies_resumed_total",
        "counter",
        "Replies taken up that an earlier process had begun.",
    ),
    Metric(
        "doubts",
        "chatserve_turns_in_doubt",
        "gauge",
        "Turns of which the store has not said whether it kept them.",
    ),
    Metric("subscribers", "chatserve_change_subscribers", "gauge", "Tabs that hear of changes."),
)

LOG_METRICS = (
    Metric("entries_total", "chatserve_reply_log_entries_total", "counter", "Entries written."),
    Metric(
        "failures_total",
        "chatserve_reply_log_failures_total",
        "counter",
        "Trips to the store that failed; their entries are sent again.",
    ),
)

STORE_METRICS = (
    Metric("available", "chatserve_store_available", "gauge", "1 while the store answers."),
    Metric("calls", "chatserve_store_calls_total", "counter", "Calls to the store."),
    Metric("failures", "chatserve_store_failures_total", "counter", "Calls without an answer."),
    Metric("seconds_total", "chatserve_store_seconds_total", "counter", "Time in these calls."),
)


KNOWN_METRICS = (
    Metric("links", "chatserve_known_links", "gauge", "Exchanges of chats whose ids are kept."),
    Metric("bytes", "chatserve_known_bytes", "gauge", "What they take, an upper estimate."),
    Metric("asked", "chatserve_known_queries_total", "counter", "Replies sent back to the server."),
    Metric("found", "chatserve_known_hits_total", "counter", "Those whose ids were still kept."),
    Metric("evicted", "chatserve_known_evictions_total", "counter", "Exchanges given up."),
)


TRANSIT_METRICS = (
    Metric(
        "",
        "chatserve_pages_in_transit",
        "gauge",
        "Pages on their way between memory and the disk, and those that wait for a copy.",
        label="state",
        parts=(("unkept", "unkept"), ("keeping", "keeping"), ("loading", "loading")),
    ),
    Metric("kept_total", "chatserve_pages_kept_total", "counter", "Pages copied to the disk."),
    Metric("loaded_total", "chatserve_pages_loaded_total", "counter", "Pages read from the disk."),
    Metric(
        "failed_total",
        "chatserve_page_loads_failed_total",
        "counter",
        "Pages that the disk was asked for and did not give; they are computed.",
    ),
    Metric(
        "lost_total",
        "chatserve_pages_lost_total",
        "counter",
        "Pages evicted before there was a copy of them.",
    ),
)

TIER_METRICS = (
    Metric("loads_total", "chatserve_loads_total", "counter", "Prompts that were loaded."),
    Metric(
        "recomputes_total",
        "chatserve_recomputes_total",
        "counter",
        "Prompts that were computed although the disk had them, being quicker so.",
    ),
    Metric("load_page_seconds", "chatserve_load_page_seconds", "gauge", "Measured, for a page."),
    Metric("keep_page_seconds", "chatserve_keep_page_seconds", "gauge", "Measured, for a page."),
    Metric(
        "move_page_seconds",
        "chatserve_move_page_seconds",
        "gauge",
        "Measured, for a page between the device and host memory.",
    ),
    Metric(
        "compute_token_seconds",
        "chatserve_compute_token_seconds",
        "gauge",
        "Measured, for a token of a prompt.",
    ),
)

HOST_METRICS = (
    Metric(
        "",
        "chatserve_host_pages",
        "gauge",
        "Pages of host memory by state.",
        label="state",
        parts=tuple((name, name) for name in ("free", "filling", "held", "cached")),
    ),
    Metric("saved_total", "chatserve_host_saved_total", "counter", "Pages copied to host memory."),
    Metric(
        "promoted_total",
        "chatserve_host_promoted_total",
        "counter",
        "Pages copied from host memory to the device.",
    ),
    Metric("evicted_total", "chatserve_host_evicted_total", "counter", "Pages that made room."),
    Metric(
        "flushed_total", "chatserve_host_flushed_total", "counter", "Pages flushed by an admin."
    ),
    Metric(
        "corrupt_total",
        "chatserve_host_corrupt_total",
        "counter",
        "Pages of host memory that were not what had been saved; they are computed.",
    ),
)

DISK_METRICS = (
    Metric("bytes", "chatserve_disk_bytes", "gauge", "What the page store takes on the disk."),
    Metric("capacity_bytes", "chatserve_disk_capacity_bytes", "gauge", "What it may take."),
)

SLAB_METRICS = (
    Metric("pages", "chatserve_disk_pages", "gauge", "Pages of this model on the disk."),
    Metric("hits", "chatserve_disk_hits_total", "counter", "Pages read, over restarts."),
    Metric(
        "misses",
        "chatserve_disk_misses_total",
        "counter",
        "Pages that were not there, or not as they should be.",
        label="reason",
        parts=tuple((name, name) for name in ("absent", "authentication", "tokens", "io")),
    ),
    Metric("writes", "chatserve_disk_writes_total", "counter", "Pages written, over restarts."),
    Metric(
        "evictions",
        "chatserve_disk_evictions_total",
        "counter",
        "Pages removed.",
        label="reason",
        parts=tuple((name, name) for name in ("space", "age", "orphan", "forgotten", "bad")),
    ),
    Metric("io_errors", "chatserve_disk_errors_total", "counter", "Calls that the disk refused."),
)


def disk_families(statistics: object) -> list[Family]:
    """The page store and its one open slab."""
    slabs: tuple[object, ...] = getattr(statistics, "slabs", ())
    degraded = getattr(statistics, "degraded", None)
    found = families(statistics, DISK_METRICS)
    if slabs:
        found += families(slabs[0], SLAB_METRICS)
    if statistics is not None:
        meaning = "1 while the disk refuses, and nothing is written."
        sample = Sample(float(degraded is not None))
        found.append(Family("chatserve_disk_degraded", "gauge", meaning, (sample,)))
    return found


def all_families(statistics: Mapping[str, object]) -> list[Family]:
    """What the floors' statistics are as metrics. Who has none yet is left out.

    statistics: `cache`, `engine`, `conversations`, `store`, `known_ids`, `disk`, each a frozen
    picture or None.
    """
    chats = statistics.get("conversations")
    tiers = getattr(statistics.get("engine"), "tiers", None)
    host = getattr(tiers, "host", None)
    above_disk = statistics.get("cache") if host is None else host
    return [
        *families(statistics.get("engine"), ENGINE_METRICS),
        *families(statistics.get("cache"), CACHE_METRICS),
        *cache_usage(statistics.get("cache")),
        *families(chats, CONVERSATION_METRICS),
        *families(getattr(chats, "log", None), LOG_METRICS),
        *families(statistics.get("store"), STORE_METRICS),
        *families(statistics.get("known_ids"), KNOWN_METRICS),
        *families(getattr(above_disk, "transit", None), TRANSIT_METRICS),
        *families(tiers, TIER_METRICS),
        *families(host, HOST_METRICS),
        *disk_families(statistics.get("disk")),
    ]


def cache_usage(statistics: object) -> list[Family]:
    """vLLM's share of pages in use: cached pages count as free, because they can be had."""
    pages: object = getattr(statistics, "pages", None)
    total = getattr(pages, "total", 0)
    if not total:
        return []
    available: int = getattr(pages, "free", 0) + getattr(pages, "cached", 0)
    meaning = "Share of the device pages in use; 1 is all of them."
    sample = Sample((total - available) / total)
    return [Family("chatserve_kv_cache_usage_perc", "gauge", meaning, (sample,))]
