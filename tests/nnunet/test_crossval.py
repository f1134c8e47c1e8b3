"""`nnunet_diffusion crossval` as its page types it, here and on a real Slurm, where jobs are preempted and killed."""

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
PAGE = (Path(__file__).parents[2] / "documentation" / "cluster.md").read_text(encoding="utf-8")
FIRST, OURS = "SeededTinynnUNetTrainer", "SeededTinyDiffusionTrainer"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATCH = [32, 32]


def commands(section):
    """The commands of a section of the page, for the small dataset and without a GPU."""
    text = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    found = re.findall(r"^nnunet_diffusion (.*)$", text, re.MULTILINE)
    replaced = {"nnUNetTrainer": FIRST, "DiffusionTrainerUNet": OURS, "--mem 32G": "--mem 1G", "--cpus 8": "--cpus 1"}
    for old, new in replaced.items():
        found = [line.replace(old, new) for line in found]
    return [line.split() + (["-p", "Tiny", "-device", "cpu"] if "-tr" in line else []) for line in found]


@pytest.fixture(scope="module")
def discs(workplace_type, tmp_path_factory):
    """Ten generated images of discs, preprocessed, with small plans."""
    place = workplace_type(tmp_path_factory.mktemp("crossval"), "Dataset004_Discs")
    generator, (rows, columns) = np.random.default_rng(0), np.mgrid[:40, :40]
    for folder in ("imagesTr", "labelsTr"):
        (place.raw / folder).mkdir(parents=True)
    for case in range(10):
        disc = (rows - generator.integers(14, 26)) ** 2 + (columns - generator.integers(14, 26)) ** 2 < 60
        image = (generator.integers(0, 60, (40, 40)) + 120 * disc).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(place.raw / "imagesTr" / f"case{case}_0000.png"))
        sitk.WriteImage(sitk.GetImageFromArray(disc.astype(np.uint8)), str(place.raw / "labelsTr" / f"case{case}.png"))
    description = {
        "channel_names": {"0": "grey"}, "labels": {"background": 0, "disc": 1}, "numTraining": 10, "file_ending": ".png"
    }  # fmt: skip
    with place.planned_in_process(place.root / "results", "2d", PATCH, **description):
        pass
    return place


def crossval(place, results, *words, check=True, **variables):
    return place.run("nnunet_diffusion", *words, check=check, nnUNet_results=str(results), **variables)


def wait_until(happened, seconds=240):
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.2)
    return found


def held(results, *tasks):
    """A folder with a file for each training that is to stay in its second epoch until that is removed."""
    folder = results / "hold"
    folder.mkdir()
    for task in tasks:
        (folder / task).touch()
    return folder


def log_of(results, place, task):
    path = results / place.dataset / "crossval" / "logs" / f"{task}.log"
    return path.read_text() if path.is_file() else ""


def processes(*words):
    """Numbers of the Python processes whose command has all these words, the oldest first."""
    found = subprocess.run(["ps", "-wweo", "pid=,args=", "--sort=start_time"], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=1) for line in found.splitlines() if all(word in line for word in words)]
    return [int(pid) for pid, _ in rows]


@pytest.fixture(scope="module")
def here(discs, tmp_path_factory):
    """The page's commands for one fold on this machine, which nothing disturbs; the results and what is printed."""
    results = tmp_path_factory.mktemp("here")
    dry, run, status = commands("On this machine")
    told = {"dry": crossval(discs, results, *dry, "--folds", 0).stdout}
    assert not (results / discs.dataset).exists()
    words, task = [*run, "--folds", 0], f"{FIRST}__2d__fold_0"
    hold = held(results, task)
    with discs.start("nnunet_diffusion", *words, nnUNet_results=str(results), TEST_HOLD=str(hold)) as job:
        try:
            wait_until(lambda: "Epoch 1" in log_of(results, discs, task))
            told["running"] = crossval(discs, results, *status).stdout
            told["second"] = crossval(discs, results, *words, check=False)
        finally:
            (hold / task).unlink()
        told["end"] = job.stdout.read()
    assert job.returncode == 0, told["end"]
    told["again"] = crossval(discs, results, *words).stdout
    return results, told


def test_what_happens_here_is_told(here, discs):
    results, told = here
    folder = results / discs.dataset / "crossval"
    assert [line.split()[0] for line in told["dry"].splitlines()[1:5]] == [
        f"{FIRST}__2d__fold_0", f"{OURS}__2d__fold_0", "find_best", f"compare__{OURS}__2d",
    ]  # fmt: skip
    assert "hours unknown" in told["dry"]
    assert "running, epoch 1" in told["running"] and "to do" in told["running"]
    assert told["second"].returncode == 2 and "another call works on the cross-validation" in told["second"].stderr
    assert "All tasks are done" in told["end"] and "All 4 tasks are done" in told["again"]
    assert len(list(folder.glob(f"compare__{OURS}__2d/*.html"))) == 1
    assert (results / discs.dataset / "inference_instructions.txt").is_file()


def test_terminated_then_killed_here_and_finished_by_the_same_command(discs, tmp_path):
    run = commands("On this machine")[1]
    run.remove(OURS)
    words, task = [*run, "--folds", 1], f"{FIRST}__2d__fold_1"
    hold = held(tmp_path, task)
    variables = {"nnUNet_results": str(tmp_path), "TEST_HOLD": str(hold), "nnUNet_n_proc_DA": "2"}

    def ended_in_epoch_1(times, end):
        """Start the command, end it in the training's second epoch; return the exit code and what was printed."""
        with discs.start("nnunet_diffusion", *words, **variables) as job:
            wait_until(lambda: log_of(tmp_path, discs, task).count("Epoch 1") == times)
            end(job.pid, processes("nnunet_diffusion train 4 2d 1", FIRST)[0])
            printed = job.stdout.read()
        return job.returncode, printed

    code, printed = ended_in_epoch_1(1, lambda all_of_it, training: os.kill(all_of_it, signal.SIGTERM))
    assert code == 143 and "the same command continues" in printed
    assert "Ended by SIGTERM" in log_of(tmp_path, discs, task)
    assert not processes("nnunet_diffusion train 4 2d 1", FIRST)
    code, printed = ended_in_epoch_1(2, lambda all_of_it, training: os.kill(training, signal.SIGKILL))
    for worker in processes("nnunet_diffusion train 4 2d 1", FIRST):
        os.kill(worker, signal.SIGKILL)  # nobody ends those of a killed training
    assert code == 1 and f"{task} failed with exit code -9" in printed and f"{task} failed. The end of" in printed
    status = crossval(discs, tmp_path, "crossval", "-d", 4, "--status", check=False)
    assert status.returncode == 1 and status.stdout.count("not run") == 2
    (hold / task).unlink()
    assert "All tasks are done" in crossval(discs, tmp_path, *words).stdout
    log = log_of(tmp_path, discs, task)
    assert log.count("Epoch 0") == 1 and log.count("Epoch 1") == 3
    first = read_checkpoint(tmp_path / discs.dataset / f"{FIRST}__Tiny__2d" / "fold_1" / "checkpoint_final.pth")
    assert first["current_epoch"] == 2 and len(first["logging"]["train_losses"]) == 2


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A Slurm of one node in a temporary folder, with the partition of the page and one that preempts it; its SLURM_CONF."""
    if missing := [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge")
    root, host, user = tmp_path_factory.mktemp("slurm"), socket.gethostname(), getpass.getuser()
    for name in ("state", "spool"):
        (root / name).mkdir()
    key = root / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf = root / "slurm.conf"
    conf.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 GraceTime=90 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
""")
    files = {
        "socket": "munge.socket",
        "key-file": "key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    munged = ["munged", "--foreground", "--force", *(f"--{name}={root / file}" for name, file in files.items())]
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with contextlib.ExitStack() as running, (root / "daemons.log").open("w") as log:
        for words in (munged, ["slurmctld", "-D", "-i", "-f", conf], ["slurmd", "-D", "-f", conf, "-N", host]):
            daemon = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
            running.callback(daemon.wait)
            running.callback(daemon.terminate)
            if words is munged:
                wait_until((root / "munge.socket").exists, 20)
        running.callback(
            subprocess.run, ["scancel", "--user", user, "--signal=KILL", "--full"], env=environment, check=False
        )
        ask = lambda: subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True).stdout  # noqa: E731
        wait_until(lambda: "idle" in ask(), 60)
        yield str(conf)


def queue(conf):
    """Slurm's jobs: name -> state and reason."""
    done = subprocess.run(
        ["squeue", "-h", "-o", "%j|%T|%r"], env={**os.environ, "SLURM_CONF": conf}, capture_output=True, text=True
    )
    return {line.split("|")[0]: line for line in done.stdout.splitlines()}


def test_five_folds_on_slurm_preempted_and_killed_equal_undisturbed_ones(slurm, discs, here, tmp_path):
    submit, status = commands("On Slurm")
    task, ours = f"{FIRST}__2d__fold_0", f"{OURS}__2d__fold_0"
    hold = held(tmp_path, task, ours)
    variables = {"SLURM_CONF": slurm, "TEST_HOLD": str(hold)}
    told = crossval(discs, tmp_path, *submit, **variables).stdout
    assert "12 tasks submitted, 0 already there" in told
    again = crossval(discs, tmp_path, *submit, **variables).stdout
    assert "0 tasks submitted, 12 already there" in again
    wait_until(lambda: "Epoch 1" in log_of(tmp_path, discs, task))
    # needs the whole node, so it preempts all that runs there, in mid-epoch
    urgent = [
        "sbatch",
        "--partition=urgent",
        "--exclusive",
        "--output=/dev/null",
        "--job-name=urgent",
        "--wrap=sleep 1",
    ]
    subprocess.run(urgent, env={**os.environ, "SLURM_CONF": slurm}, check=True)
    wait_until(lambda: "Ended by SIGTERM" in log_of(tmp_path, discs, task))
    (hold / task).unlink()
    shown = wait_until(
        lambda: "BeginTime" in queue(slurm).get(task, "") and crossval(discs, tmp_path, *status, **variables)
    )
    assert re.search(rf"{task} +waiting", shown.stdout)
    wait_until(lambda: "Epoch 1" in log_of(tmp_path, discs, ours))
    os.kill(processes("nnunet_diffusion train 4 2d 0", OURS)[0], signal.SIGKILL)
    (hold / ours).unlink()
    wait_until(lambda: not queue(slurm))
    failed = crossval(discs, tmp_path, *status, check=False, **variables)
    assert failed.returncode == 1 and f"{ours} failed. The end of" in failed.stdout
    assert re.search(r"find_best +not run", failed.stdout)
    assert "3 tasks submitted, 0 already there" in crossval(discs, tmp_path, *submit, **variables).stdout
    wait_until(lambda: not queue(slurm))
    finished = crossval(discs, tmp_path, *status, **variables).stdout
    assert len(re.findall(r"__fold_\d +done", finished)) == 10 and len(re.findall(r" done ", finished)) == 12, finished
    assert "All 12 tasks are done" in crossval(discs, tmp_path, *submit, **variables).stdout
    for name in (task, ours):
        trainer = name.split("__")[0]
        disturbed, undisturbed = (
            results / discs.dataset / f"{trainer}__Tiny__2d" / "fold_0" for results in (tmp_path, here[0])
        )
        one, other = (read_checkpoint(folder / "checkpoint_final.pth") for folder in (disturbed, undisturbed))
        assert one["current_epoch"] == other["current_epoch"] == 2
        assert one["logging"]["train_losses"] == other["logging"]["train_losses"]
        for key, value in other["network_weights"].items():
            assert torch.equal(one["network_weights"][key], value), (name, key)
        masks = sorted(path.name for path in (undisturbed / "validation").glob("*.png"))
        assert len(masks) == 2
        for mask in masks:
            assert (disturbed / "validation" / mask).read_bytes() == (undisturbed / "validation" / mask).read_bytes()
    results = json.loads((tmp_path / discs.dataset / "inference_information.json").read_text())
    assert set(results["all_results"]) == {f"{FIRST}__Tiny__2d", f"{OURS}__Tiny__2d"}
