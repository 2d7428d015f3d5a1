"""Who has a certificate in a cluster, what it is for, and who may call whom."""

from enum import StrEnum

from cryptography.x509 import ObjectIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID

CLUSTER_NAME = "colm-serve"
"""Name of a gateway to its clients. Certificates name roles, not addresses, so they are valid wherever a replica lands.
"""

_SERVES, _CALLS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


class Member(StrEnum):
    """A holder of a key and a certificate; the value is the name of its file."""

    PUBLIC = "public"
    """The gateway, to clients."""
    GATEWAY = "gateway"
    """The gateway, to decode nodes."""
    DECODE = "decode"
    PREFILL = "prefill"

    @property
    def certificate_name(self) -> str:
        """The name that its certificate is for."""
        return CLUSTER_NAME if self is Member.PUBLIC else f"{self.value}.{CLUSTER_NAME}"

    @property
    def usages(self) -> list[ObjectIdentifier]:
        """Whether its certificate serves, calls, or does both."""
        is_called, calls = self is Member.PUBLIC or self.caller is not None, self.callee is not None
        return [_SERVES] * is_called + [_CALLS] * calls

    @property
    def callee(self) -> "Member | None":
        """Whom it calls."""
        return _CALLEES.get(self)

    @property
    def caller(self) -> "Member | None":
        """Who may call it by a certificate; None where that is nobody, or everybody."""
        return next((caller for caller, callee in _CALLEES.items() if callee is self), None)


_CALLEES = {Member.GATEWAY: Member.DECODE, Member.DECODE: Member.PREFILL}
