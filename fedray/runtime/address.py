"""The address of a Ray cluster, checked before Ray connects: Ray itself waits minutes for a cluster that is gone."""

import logging
import os
from typing import Any, cast

import grpc
from ray._private import services
from ray._private.authentication import authentication_token_setup
from ray._private.gcs_utils import create_gcs_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from fedray.errors import ConfigError

ANSWER_S = 5.0
"""Seconds that a cluster may take to answer."""

TOKEN_HELP = (
    "give the cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token); "
    "on the head, `ray get-auth-token` prints it"
)


def check_address(setting: str = "RAY_ADDRESS") -> str | None:
    """Check that the cluster that RAY_ADDRESS names, or else the one that `ray start` has started on this machine,
    answers and accepts this process's token.

    Args:
        setting: another environment variable that names a cluster by the address of its head.

    Returns:
        The address of its head, HOST:PORT; None: there is no such cluster.

    Raises:
        ConfigError: the variable has another form, or the cluster does not answer or asks for another token.
    """
    given = os.environ.get(setting, "")
    canonical = cast(Any, services.canonicalize_bootstrap_address)  # Ray's own rules; its types leave out None
    if "://" in given:
        scheme = given.partition("://")[0]
        what = "Ray Client, over which results cannot be streamed" if scheme == "ray" else "the address of a dashboard"
        raise ConfigError(
            f"{setting}: {given!r} is {what}; run on a machine of the cluster with the address of its head, as in "
            "HEAD:6379, or submit the experiment as a job: `fedray submit --address http://HEAD:8265`"
        )
    try:
        address: str | None = canonical(given or None)
    except ConnectionError:
        raise ConfigError(
            f"{setting}: {given!r}, but no Ray cluster runs on this machine; start one with `ray start --head`, or "
            f"unset {setting}: a run then starts its own"
        ) from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {given!r} is not an address, as in HEAD:6379: {error}") from None
    if address is not None:
        named = given not in ("", "auto")
        where = f"{setting}: the Ray cluster at {given}" if named else f"the Ray cluster of this machine, {address},"
        change = f"correct {setting}, " if named else ""
        leave = f"unset {setting}" if named else "set RAY_ADDRESS=local"
        _check_answers(address, where, f"{change}start it (`ray start --head`), or {leave}: a run then starts its own")
    return address


def _check_answers(address: str, where: str, change: str) -> None:
    """Check that a cluster answers at HOST:PORT.

    Args:
        where, change: what messages call the cluster, and what they say must be changed if it does not answer.

    Raises:
        ConfigError: it does not answer, or asks for another token.
    """
    use_token()
    messages: Any = gcs_service_pb2
    services_of: Any = gcs_service_pb2_grpc
    try:
        with create_gcs_channel(address) as channel:
            nodes = services_of.NodeInfoGcsServiceStub(channel)
            nodes.GetAllNodeInfo(messages.GetAllNodeInfoRequest(limit=1), timeout=ANSWER_S)
    except AuthenticationError:
        raise ConfigError(
            f"{where} cannot be asked: RAY_AUTH_MODE is token, but no token was found; {TOKEN_HELP}"
        ) from None
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            has_token = os.environ.get(authentication_token_setup.AUTH_MODE_ENV_VAR, "").lower() == "token"
            raise ConfigError(f"{where} asks for {'another' if has_token else 'a'} token: {TOKEN_HELP}") from None
        raise ConfigError(f"{where} does not answer ({_reason(error)}); {change}") from None


def use_token() -> None:
    """Let this process send the cluster's token if it has one and RAY_AUTH_MODE does not forbid it, as `ray.init`
    does."""
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _reason(error: grpc.RpcError) -> str:
    """Return why a call failed, in a few words."""
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ANSWER_S:.0f} s"
    details: str = error.details() or error.code().name
    if "HTTP/2" in details:
        return "what listens there is not the head; the dashboard, for example, has a port of its own"
    return details.rpartition(": ")[2].rstrip("]")
