"""Joining a cluster that is not there: told at once, before any work."""

import socket

import pytest

from chrysalis_ray.body.cluster import check_address
from chrysalis_ray.core.errors import BodyError


def test_an_address_where_nobody_listens_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
        check_address(f"ray://127.0.0.1:{port}")
    with pytest.raises(BodyError, match=f"nobody answers at 127.0.0.1:{port}"):
        check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["nonsense", "", ":", "host:", "host:0", "host:99999", "http://host/path"])
def test_what_is_no_address_is_told(address):
    with pytest.raises(BodyError, match="is no address"):
        check_address(address)


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_words_that_name_no_host_are_left_to_ray(address):
    check_address(address)
