"""Who a process is among those of a run, from flags, variables and schedulers."""

import pytest

from mlt.errors import UserError
from mlt.train.processes import Processes, find_processes, first_host

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}


def test_nothing_set_is_one_process():
    assert find_processes({}) is None
    assert find_processes({"JOB_COMPLETION_INDEX": "2"}) is None
    assert find_processes(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_variables_and_flags():
    variables = {"MLT_COORDINATOR": "node7:8476", "MLT_NUM_PROCESSES": "2", "MLT_PROCESS_ID": "1"}
    assert find_processes(variables) == Processes("node7", 8476, 2, 1)
    assert find_processes(variables, process_id=0, coordinator="[::1]:99") == Processes("::1", 99, 2, 0)
    assert find_processes(variables | {"MLT_LOCAL_DEVICES": "4,5"}) == Processes("node7", 8476, 2, 1, (4, 5))


def test_slurm():
    assert find_processes(SLURM) == Processes("node007", 61440 + 4, 4, 3, (2, 3))
    # Bound to one GPU each by SLURM, or no GPUs at all: nothing to share.
    assert find_processes(SLURM | {"CUDA_VISIBLE_DEVICES": "0"}).local_devices is None
    assert find_processes(SLURM | {"MLT_COORDINATOR": "other:80"}) == Processes("other", 80, 4, 3, (2, 3))


def test_slurm_host_lists():
    lists = {"node7": "node7", "a,b": "a", "n[07-12,20],m3": "n07", "n[5]": "n5", "a,n[1-2]": "a", "n[1-2]-ib,z": "n1-ib"}
    assert {text: first_host(text) for text in lists} == lists


def test_kubernetes():
    pod = {"MLT_COORDINATOR": "train-workers-0-0.train:8476", "MLT_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert find_processes(pod) == Processes("train-workers-0-0.train", 8476, 4, 3)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MLT_COORDINATOR": "a:1"}, ["MLT_COORDINATOR=a:1", "MLT_NUM_PROCESSES", "--process-id"]),
        ({"MLT_NUM_PROCESSES": "2", "MLT_PROCESS_ID": "0"}, ["MLT_COORDINATOR (or --coordinator) is not"]),
        ({"MLT_COORDINATOR": "a", "MLT_NUM_PROCESSES": "2", "MLT_PROCESS_ID": "0"}, ["MLT_COORDINATOR='a'", "node07:8476"]),
        ({"MLT_COORDINATOR": "a:1", "MLT_NUM_PROCESSES": "2", "MLT_PROCESS_ID": "2"}, ["MLT_PROCESS_ID=2", "0 to 1"]),
        ({"MLT_COORDINATOR": "a:1", "MLT_NUM_PROCESSES": "two", "MLT_PROCESS_ID": "0"}, ["MLT_NUM_PROCESSES='two'"]),
        (SLURM | {"MLT_LOCAL_DEVICES": "0-3"}, ["MLT_LOCAL_DEVICES='0-3'"]),
    ],
)
def test_what_is_missing_or_malformed_is_named(variables, says):
    with pytest.raises(UserError) as refused:
        find_processes(variables)
    for text in says:
        assert text in str(refused.value)
