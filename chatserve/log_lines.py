"""Log lines: JSON for machines, short lines for a person at a terminal. Never prompt text."""

import json
import logging
import sys
from datetime import UTC, datetime

_LIBRARIES = ("uvicorn", "uvicorn.error", "asyncio", "transformers", "httpx", "sse_starlette")


class JsonLines(logging.Formatter):
    """One JSON object a line. A message that is a JSON object already is merged in."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        message = record.getMessage()
        fields = _json_object(message)
        line |= {"message": message} if fields is None else fields
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _json_object(message: str) -> dict[str, object] | None:
    if not message.startswith("{"):
        return None
    try:
        return json.loads(message)
    except ValueError:
        return None


def set_up_logging(level: str) -> None:
    """Send all logs to stderr: libraries from warnings up, ours from `level` up."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    else:
        handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("chatserve").setLevel(level.upper())
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
