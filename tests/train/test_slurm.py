"""A Slurm task knows its rank, and where rank 0 is."""

import pytest

from expertmesh.train.errors import ConfigError
from expertmesh.train.launch import slurm_variables

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[08-09,12]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("a,b-2,c", "a"),
        ("b-2,c", "b-2"),
        ("node[01-03,7],login", "node01"),
        ("login,node[01-03,7]", "login"),
        ("n[098-101]", "n098"),
        ("r[1-2]n[3,5].cluster", "r1n3.cluster"),
    ],
)
def test_the_first_of_a_list_of_hosts(hosts, first):
    assert slurm_variables(TASK | {"SLURM_JOB_NODELIST": hosts})["MASTER_ADDR"] == first


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


def test_a_variable_that_is_missing_is_named():
    del (task := dict(TASK))["SLURM_LOCALID"]
    with pytest.raises(ConfigError, match="without all of srun's variables .*: 'SLURM_LOCALID'"):
        slurm_variables(task)
