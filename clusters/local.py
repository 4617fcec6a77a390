"""Start and stop an autoscaling cluster that is simulated on this machine (local-autoscaling.yaml).

    python clusters/local.py up [--port 6399] [--dashboard-port 8275]
    python clusters/local.py down

It uses its own ports and its own folder, so it can run next to any other Ray on this machine. `down` ends only its
processes.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("FEDRAY_LOCAL_CLUSTER", "/tmp/fedray-local"))
PID = FOLDER / "head.pid"
START_S = 120.0


def up(port: int, dashboard_port: int) -> None:
    if running() is not None:
        sys.exit(f"it is running already, as process {running()}; end it with: python {sys.argv[0]} down")
    for taken in (port, dashboard_port):
        if listening(taken):
            sys.exit(f"port {taken} is taken; choose others with --port and --dashboard-port")
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((HERE / "local-autoscaling.yaml").read_text())
    config["provider"]["gcs_address"] = f"127.0.0.1:{port}"
    file = FOLDER / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(config))
    node = config["provider"]["head_node_id"]
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": node,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node,
        "RAY_AUTH_MODE": "token",
        "FEDRAY_STORAGE": os.getcwd(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),  # pretend_nodes.py
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs start with `python`
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0"]
    options = [
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        "--dashboard-agent-listen-port=0",  # any free port, because another Ray may use the default one
        f"--temp-dir={FOLDER / 'ray'}",
        f"--autoscaling-config={file}",
        "--node-ip-address=127.0.0.1",
        "--disable-usage-stats",
    ]
    with open(FOLDER / "head.log", "w") as log:
        head = subprocess.Popen([*ray, *options], env=environment, stdout=log, stderr=log, start_new_session=True)
    PID.write_text(str(head.pid))
    until = time.monotonic() + START_S
    while not listening(dashboard_port):
        if head.poll() is not None or time.monotonic() > until:
            sys.exit(f"the head did not start; {FOLDER / 'head.log'} says why")
        time.sleep(0.5)
    print(f"submit with: fedray submit CONFIG --address http://127.0.0.1:{dashboard_port}")


def down() -> None:
    """End the head and everything that it started; its simulated nodes are processes of this machine."""
    ended = of_folder()
    if (pid := running()) is not None:
        head = psutil.Process(pid)
        ended += head.children(recursive=True)
        head.send_signal(signal.SIGTERM)
        psutil.wait_procs([head], timeout=10)
    if not ended:
        sys.exit("it is not running")
    for one in {*ended, *of_folder()}:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    PID.unlink(missing_ok=True)


def of_folder() -> list[psutil.Process]:
    """Return the processes whose command line names this cluster's folder."""
    found = []
    for one in psutil.process_iter(["cmdline"]):
        words = one.info["cmdline"] or ()
        if one.pid != os.getpid() and any(f"{FOLDER}/ray" in word for word in words):
            found.append(one)
    return found


def running() -> int | None:
    """Return the head's process id if it runs. Another process may have the recorded id by now, so this checks."""
    try:
        pid = int(PID.read_text())
    except (OSError, ValueError):
        return None
    return pid if pid in {one.pid for one in of_folder()} else None


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--port", type=int, default=6399)
    parser.add_argument("--dashboard-port", type=int, default=8275)
    args = parser.parse_args()
    if args.what == "up":
        up(args.port, args.dashboard_port)
    else:
        down()


if __name__ == "__main__":
    main()
