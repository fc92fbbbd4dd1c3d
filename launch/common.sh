# Sourced by the launchers: --print, names that are safe, secrets that stay secret.
# shellcheck shell=bash

# Environment variables that other machines get when they are set; values are never shown.
secrets=(HF_TOKEN WANDB_API_KEY)
printing= # --print sets it

refuse() {
  echo "flaxlm: $1" >&2
  exit 2
}

# need WHAT VALUE REGEX: refuses what could be read as an option or run by a shell.
need() {
  [[ "$2" =~ ^$3$ ]] || refuse "$1 cannot be used: given '$2', needed $3"
}

# Replaces secrets by their names, where the text is for people.
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

# Runs a command; after --print, shows it instead.
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

# Writes NAME=VALUE lines to a file that its owner alone can read.
write_secrets() {
  local name
  (umask 077 && : >"$1")
  for name in "${secrets[@]}"; do
    [ -z "${!name:-}" ] || echo "$name=${!name}" >>"$1"
  done
}
