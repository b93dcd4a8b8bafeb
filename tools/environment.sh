# The one way the project's environment is made. Sourced with $root set; sets $python.
#
# .venv is built from tools/constraints.txt and pyproject.toml, and built anew when either changes
# (a stamp says from which it was made). METABLOCKS_PYTHON names the interpreter to build it with.

fail() {
    echo "$0: $1" >&2
    exit 1
}

find_interpreter() {
    for candidate in ${METABLOCKS_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
            2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 to 3.14 with the venv module; install one, or name it in METABLOCKS_PYTHON"
}

make_environment() {
    interpreter=$(find_interpreter) || exit 1
    echo "making $venv with $("$interpreter" --version) (a few minutes, this time only) …" >&2
    rm -rf "$venv"
    log=$(mktemp)
    unset PYTHONPATH PYTHONHOME # what lies there would count as installed
    {
        "$interpreter" -m venv "$venv" &&
            "$python" -m pip install --disable-pip-version-check -q \
                -c "$root/tools/constraints.txt" hatchling editables &&
            "$python" -m pip install --disable-pip-version-check -q --no-build-isolation \
                -c "$root/tools/constraints.txt" -e "$root[test]"
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

waiting=
while [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; do
    lock=$root/.venv.lock # a link to the number of the process that is making it at this moment
    if ln -s "$$" "$lock" 2>/dev/null; then
        trap 'rm -f "$lock"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        make_environment
        rm -f "$lock"
        trap - EXIT INT TERM
    elif owner=$(readlink "$lock") && ! kill -0 "$owner" 2>/dev/null; then
        rm -f "$lock" # it was killed
    else
        [ -n "$waiting" ] || echo "waiting for process $owner to make $venv …" >&2
        waiting=yes
        sleep 1
    fi
done
