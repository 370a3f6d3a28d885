"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("kddata", deadline=None)  # wall time says nothing on a machine with other work
settings.load_profile("kddata")


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of moto's server, which honours conditional requests, on a free port of this machine.

    One for all tests: fsspec keeps its S3 connection for as long as the process lives.
    """
    import fsspec
    from moto import server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    running.stop()
