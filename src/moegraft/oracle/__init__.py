"""Which backend serves a request, with the reason for every rejection. Pure data: no weight is touched."""

from moegraft.oracle.select import Decision, Rejection, select_experts, why_no_dora, why_not

__all__ = ["Decision", "Rejection", "select_experts", "why_no_dora", "why_not"]
