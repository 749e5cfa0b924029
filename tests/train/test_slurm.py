"""A Slurm task knows its rank, and where rank 0 is."""

import pytest

from expertmesh.train.errors import ConfigError
from expertmesh.train.slurm import expand_hosts, is_slurm_rank, slurm_variables

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[08-09,12]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("hosts", "expanded"),
    [
        ("node1", ["node1"]),
        ("a,b-2,c", ["a", "b-2", "c"]),
        ("node[01-03,7],login", ["node01", "node02", "node03", "node7", "login"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5].cluster", ["r1n3.cluster", "r1n5.cluster", "r2n3.cluster", "r2n5.cluster"]),
    ],
)
def test_lists_of_hosts(hosts, expanded):
    assert expand_hosts(hosts) == expanded


def test_scontrol_is_asked_where_it_is_there(tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$1-$2-$3"\necho second\n')
    (tmp_path / "scontrol").chmod(0o755)
    assert expand_hosts("x[1-2]") == ["show-hostnames-x[1-2]", "second"]


def test_the_address_is_the_first_host_and_not_the_launching_one():
    assert slurm_variables(TASK) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node08",
        "MASTER_PORT": "14711",
    }


def test_an_address_that_is_set_is_kept():
    given = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "5000"}
    assert given.items() <= slurm_variables(TASK | given).items()


def test_one_task_is_no_rank():
    assert is_slurm_rank(TASK)
    assert not is_slurm_rank(TASK | {"SLURM_NTASKS": "1"})
    assert not is_slurm_rank({"SLURM_NTASKS": "8"})


def test_a_variable_that_is_missing_is_named():
    del (task := dict(TASK))["SLURM_LOCALID"]
    with pytest.raises(ConfigError, match="SLURM_LOCALID is not set"):
        slurm_variables(task)
