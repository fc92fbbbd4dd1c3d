# Sourced by the launchers: --print, checks of names, and handling of secrets.
# shellcheck shell=bash

# Environment variables passed on to other machines when set; values are never shown.
secrets=(HF_TOKEN WANDB_API_KEY)
printing= # --print sets it

refuse() {
  echo "flaxlm: $1" >&2
  exit 2
}

# need WHAT VALUE REGEX: refuses values that could act as an option or as shell code.
need() {
  [[ "$2" =~ ^$3$ ]] || refuse "$1 cannot be used: given '$2', needed $3"
}

# Replaces secrets by their names when the text is only printed.
hide() {
  local text="$1" name value
  for name in "${secrets[@]}"; do
    value="${!name:-}"
    [ -z "$printing" ] || [ -z "$value" ] || text=${text//"$value"/"<$name>"}
  done
  echo "$text"
}

# Quotes words for a shell.
quote() {
  local word words=() quoted="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/$quoted}'"
    words+=("$word")
  done
  hide "${words[*]-}"
}

# Runs a command; with --print, shows it instead.
run() {
  if [ -n "$printing" ]; then
    quote "$@"
  else
    "$@"
  fi
}

has_secrets() {
  local name
  for name in "${secrets[@]}"; do
    [ -z "${!name:-}" ] || return 0
  done
  return 1
}

# Writes NAME=VALUE lines to a file that only its owner can read.
write_secrets() {
  local name
  (umask 077 && : >"$1")
  for name in "${secrets[@]}"; do
    [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$1"
  done
}
