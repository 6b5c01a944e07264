"""Errors of remote storage as one line. What a library says of one may contain keys, so only its kind is repeated."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from llmgr_rec.errors import UserError

# Codes of S3 and of HTTP, and names of exceptions, by what they mean.
_EXPIRED = {
    "ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "UnauthorizedSSOTokenError",
    "SSOTokenLoadError", "TokenRetrievalError", "RefreshError",
}  # fmt: skip
_UNKNOWN = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure", "InvalidClientTokenId",
    "UnrecognizedClientException", "401",
}  # fmt: skip
_ABSENT = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"}
# S3 answers a request for the size of an object with 400 if the credentials have expired, and gives no reason.
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "400", "403", "PermissionError"}
_NO_BUCKET = {"NoSuchBucket"}
_NETWORK = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
    "ProxyConnectionError", "HTTPClientError", "ClientConnectorError", "ClientConnectorDNSError",
    "ServerTimeoutError", "ServerDisconnectedError", "ConnectionRefusedError", "ConnectionResetError",
    "FSTimeoutError", "TimeoutError", "gaierror", "TransportError", "SSLError", "ClientOSError",
}  # fmt: skip
_NO_BUCKET_REMEDY = "the bucket does not exist; create it, or correct its name"
_REMEDIES = (
    (_EXPIRED, "the credentials have expired; renew them and run the same command again"),
    (_UNKNOWN, "the storage does not know the credentials; give others in the environment or profile of its client"),
    (_ABSENT, "there are no credentials; give them in the environment or profile of its client, such as AWS_PROFILE"),
    (_NO_BUCKET, _NO_BUCKET_REMEDY),
    (_DENIED, "permission denied; use credentials that have not expired and may read, write, list and delete there"),
    (
        _NETWORK,
        "the storage cannot be reached; check the network and the address of the storage, such as AWS_ENDPOINT_URL",
    ),
)
# Errors of the copy on this machine.
_OF_THIS_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Packages whose exceptions say that the storage failed.
_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "fsspec", "pyarrow"}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


@contextmanager
def remote_errors(url: object, writes: bool = False) -> Iterator[None]:
    """Turns errors of remote storage in the block into user errors, except that a file does not exist.

    Args:
        url: What is read or written.
        writes: Whether the block writes, so that something missing is the bucket.

    Raises:
        UserError: The storage cannot be used.
    """
    try:
        yield
    except (UserError, FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except FileNotFoundError:
        if writes:
            raise UserError(f"{url}: {_NO_BUCKET_REMEDY}") from None
        raise FileNotFoundError(2, "No such file or directory", str(url)) from None
    except ImportError as error:
        raise _missing_package(str(url)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
            raise
        if known := remote_error(error, url):
            # Not the cause, whose text may contain keys.
            raise known from None
        raise


def remote_error(error: BaseException, url: object) -> UserError | None:
    """The user error of an exception of remote storage; None if it has another reason.

    Args:
        error: The exception; its causes are searched too.
        url: What was read or written.
    """
    causes = list(_causes(error))
    names = {name for cause in causes for name in _names(cause)}
    for known, text in _REMEDIES:
        if names & known:
            return UserError(f"{url}: {text}")
    if any("libhdfs" in str(cause) for cause in causes):
        return UserError(f"{url}: libhdfs cannot be loaded; install Hadoop and Java, and set HADOOP_HOME and CLASSPATH")
    if not any(type(cause).__module__.split(".")[0] in _LIBRARIES for cause in causes):
        return None
    kinds = ", ".join(sorted(name for name in names if re.fullmatch(r"\w{1,60}", name)))
    return UserError(f"{url}: the storage failed ({kinds}); run the same command again")


def reported_error(text: str, action: str) -> UserError | None:
    """The user error of an exception of remote storage that a library reports as the text of a stack trace, as DuckDB.

    Args:
        text: What the library says.
        action: Start of the message: what was being done.

    Returns:
        None if there is no stack trace in the text.
    """
    _, trace, stack = text.partition("Traceback (most recent call last)")
    if not trace:
        return None
    names = set(re.findall(r"[A-Za-z]\w+", stack))
    remedy = next(
        (text for known, text in _REMEDIES if names & known), "the storage failed; run the same command again"
    )
    return UserError(f"{action}: {remedy}")


def _missing_package(url: str) -> UserError:
    import fsspec

    scheme = url.partition(":")[0]
    package = _PACKAGES.get(scheme, f"of {scheme}://")
    advice = f"pip install '{package}=={fsspec.__version__}'" if scheme in _PACKAGES else "install it"
    return UserError(f"{url}: the package {package} is not installed: {advice}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _names(error: BaseException) -> set[str]:
    """Names of the classes of an exception, and the codes that the storage gave."""
    names = {kind.__name__ for kind in type(error).__mro__} - {"object", "BaseException", "Exception", "OSError"}
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        names.add(str(response.get("Error", {}).get("Code", "")))
    names |= {str(code) for code in (getattr(error, "code", None), getattr(error, "status", None)) if code is not None}
    return names
