"""Every error that chatserve raises on purpose, as one tree.

    ChatserveError                 code, HTTP status, optional retry_after
    ├── RequestError               400  the asker can mend it
    │   ├── UnsupportedField       400  names the field
    │   ├── ContextLengthExceeded  400
    │   ├── NoChatTemplate         400
    │   ├── Unauthorized           401
    │   ├── Forbidden              403
    │   ├── NotFound               404
    │   ├── MethodNotAllowed       405
    │   ├── Conflict               409  a known id with another meaning, a parent still running
    │   ├── TooLarge               413
    │   └── UnsupportedMedia       415
    ├── Busy                       429  come back after retry_after seconds
    ├── Unavailable                503  loading, draining, a broken device, a store that is away
    ├── EngineError                500  our fault; the details are in the log
    │   ├── NumericalFault         500  NaN or infinity in a row of logits
    │   ├── StepFault              500  a step failed because of this request
    │   └── Quarantined            422  this very input broke a step twice before
    └── StartError                      ends the process with one line and exit status 2
        ├── SettingsError
        └── ModelRefused

The message of an error may reach a client, so it never holds prompt text, keys or paths of other
users. Only the API floor turns errors into wire shapes.
"""


class ChatserveError(Exception):
    """Root of the tree. `code` is stable and machine-readable; `status` is an HTTP hint."""

    code: str = "internal_error"
    status: int = 500

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class RequestError(ChatserveError):
    """The request is wrong and will stay wrong until the asker changes it."""

    code = "invalid_request"
    status = 400


class UnsupportedField(RequestError):
    """A field (named by `param`) that this server does not implement, at a value that matters."""

    code = "unsupported_field"


class ContextLengthExceeded(RequestError):
    """Prompt plus reply cannot fit in the served context."""

    code = "context_length_exceeded"


class NoChatTemplate(RequestError):
    """The model has no chat template, so messages cannot be rendered."""

    code = "no_chat_template"


class Unauthorized(RequestError):
    """No key, or one that nobody has."""

    code = "invalid_api_key"
    status = 401


class Forbidden(RequestError):
    """A known key without the right, a foreign Origin, or a Host that is not ours."""

    code = "forbidden"
    status = 403


class NotFound(RequestError):
    """No such route, model or object for this asker."""

    code = "not_found"
    status = 404


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    code = "method_not_allowed"
    status = 405


class Conflict(RequestError):
    """The request contradicts what is there, and may be right at another time."""

    code = "conflict"
    status = 409


class TooLarge(RequestError):
    """The body is over the limit."""

    code = "request_too_large"
    status = 413


class UnsupportedMedia(RequestError):
    """A state-changing request whose body is not `application/json`."""

    code = "unsupported_media_type"
    status = 415


class Busy(ChatserveError):
    """A limit on waiting work is reached; `retry_after` is in seconds."""

    code = "busy"
    status = 429


class Unavailable(ChatserveError):
    """The server is loading, draining, its device is broken, or its store does not answer."""

    code = "unavailable"
    status = 503


class EngineError(ChatserveError):
    """The engine could not finish a request; not the asker's fault."""

    code = "engine_error"


class NumericalFault(EngineError):
    """The model gave NaN or infinite logits for this request."""

    code = "numerical_fault"


class StepFault(EngineError):
    """A step failed, alone with this request: the request is the cause."""

    code = "step_fault"


class Quarantined(EngineError):
    """The same input broke a step before, so it is refused at the door."""

    code = "quarantined"
    status = 422


class StartError(ChatserveError):
    """chatserve cannot start; printed as one line, exit status 2."""

    code = "cannot_start"


class SettingsError(StartError):
    """An option is wrong, or two options contradict each other."""

    code = "bad_settings"


class ModelRefused(StartError):
    """The model folder is missing, broken, or of a kind that pages cannot serve."""

    code = "model_refused"
