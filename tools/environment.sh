# The one way the project's environment is made. Sourced with $root set; sets $python.
#
# .venv is built from tools/constraints.txt and pyproject.toml, and built anew when either changes
# (a stamp says from which it was made). METABLOCKS_PYTHON names the interpreter to build it with.

fail() {
    echo "$0: $1" >&2
    exit 1
}

find_interpreter() {
    for candidate in ${METABLOCKS_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.10 to 3.13 with the venv module; install one, or name it in METABLOCKS_PYTHON"
}

make_environment() {
    interpreter=$(find_interpreter) || exit 1
    echo "making $venv with $("$interpreter" --version) (a few minutes, this time only) …" >&2
    rm -rf "$venv"
    log=$(mktemp)
    {
        "$interpreter" -m venv "$venv" &&
            "$python" -m pip install --disable-pip-version-check -q \
                -c "$root/tools/constraints.txt" hatchling editables &&
            "$python" -m pip install --disable-pip-version-check -q --no-build-isolation \
                -c "$root/tools/constraints.txt" -e "$root[plot,test]"
    } >"$log" 2>&1 || {
        cat "$log" >&2
        rm -rf "$venv" "$log"
        fail "the environment could not be made; the installer's own words are above"
    }
    rm -f "$log"
    echo "$stamp" >"$venv/stamp"
}

venv=$root/.venv
python=$venv/bin/python
stamp="$(cat "$root/tools/constraints.txt" "$root/pyproject.toml" | cksum) $root"

if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    lock=$root/.venv.lock # another command may be making it at this moment
    if ! mkdir "$lock" 2>/dev/null; then
        echo "waiting for another command to make $venv (if none runs, remove $lock) …" >&2
        while [ -d "$lock" ]; do sleep 1; done
    else
        trap 'rmdir "$lock" 2>/dev/null' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        make_environment
        rmdir "$lock"
        trap - EXIT INT TERM
    fi
    [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ] || fail "$venv was not made; try again"
fi
