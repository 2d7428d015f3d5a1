"""The project's errors: one class for each thing that a caller can do about a failure."""


class ColmError(Exception):
    """Base of the project's own errors."""


class InvalidRequest(ColmError):
    """A request names a value that can never be served; trying again is useless.

    Attributes:
        field: the request's field, as the client spells it.
        value: the offending value, shortened for display.
        limit: what would have been accepted.
    """

    def __init__(self, field: str, value: object, limit: str) -> None:
        # Python refuses to print an integer of thousands of digits in base 10, never in base 16.
        shown = hex(value) if isinstance(value, int) and value.bit_length() > 256 else repr(value)
        self.field = field
        self.value = shown if len(shown) <= 80 else shown[:77] + "..."
        self.limit = limit
        super().__init__(f"{field}={self.value}: {limit}")


class UnknownModel(InvalidRequest):
    """The request names a model that this cluster does not serve."""


class Unauthenticated(ColmError):
    """The caller showed no token, or not the right one."""


class UnknownAnswer(ColmError):
    """An answer that shall be gone on with is held nowhere any more; the request may be submitted again."""


class CapacityExceeded(ColmError):
    """The request is valid, but there is no room for it now; it may be tried again later.

    Attributes:
        client_limit: which of the client's own limits is reached, as `TokenLimits` names it; empty where others
            take the room.
        retry_after_s: when another try is worth it; a second where nobody can tell.
    """

    def __init__(self, message: str, *, client_limit: str = "", retry_after_s: float = 1.0) -> None:
        self.client_limit = client_limit
        self.retry_after_s = retry_after_s
        super().__init__(message)


class PeerUnavailable(ColmError):
    """Another process broke off, could not be reached, or broke the protocol."""


class ConnectionLost(PeerUnavailable):
    """The process that was called is not reachable, or was lost while it answered; it has not said anything itself."""


class GoingAway(ConnectionLost):
    """The gateway stops, or gives way to another one; the same call may be made again, and finds whoever is there."""


class CallDropped(ConnectionLost):
    """The process that was called stopped before it had taken the call; the same call may be made again."""


class PeerRefused(PeerUnavailable):
    """Another process of the cluster does not admit this one, by its token or its certificate; another one may."""


class LeaseExpired(PeerUnavailable):
    """A call came without a lease, or after its lease had ended; a new lease may be asked for."""


class TransferSuperseded(PeerUnavailable):
    """A newer stream has taken over what this one was reading."""


class ReaderStalled(PeerUnavailable):
    """The reader of a stream has acknowledged nothing for too long, so what it was to read has been dropped."""


class ModelReplaced(ColmError):
    """An answer that shall be gone on with began with weights that others have replaced; it may be made anew."""


class PrefillUnavailable(PeerUnavailable):
    """Prefill nodes were lost again and again; another decode node would ask the same ones."""


class PeerFailed(ColmError):
    """Another process answered that it failed for a reason of its own; another replica may succeed."""


class NotFinite(ColmError):
    """The model's numbers have become NaN or infinite, and would on any other replica."""


class FingerprintMismatch(ColmError):
    """The two ends of a KV stream do not serve the same chain 1, dtype or layout."""


class DeadlineExceeded(ColmError):
    """The request's time is over."""


class CheckpointError(ColmError):
    """A checkpoint is truncated, or has a missing or misshapen part; the message names it."""


class UnsupportedModel(ColmError):
    """A source model has a property that cannot be carried over; the message names it."""


class ConfigError(ColmError):
    """A configuration file or option is wrong; the message names the option, the value and the way out."""


class ClusterError(ColmError):
    """The cluster could not be started, found or stopped; the message says what to do."""


class StateVersionMismatch(ClusterError):
    """A cluster's state file was written by another version of colm-serve, which knows other fields."""
