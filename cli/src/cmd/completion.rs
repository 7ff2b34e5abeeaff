//! `completion`: prints completion scripts for shells.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::{failure::Failure, output::Output};

/// Arguments of `completion`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl completion bash > /etc/bash_completion.d/sandboxctl
  source <(sandboxctl completion zsh)
  sandboxctl completion fish > ~/.config/fish/completions/sandboxctl.fish

The scripts for bash, zsh and fish ask the controller for ids, exec ids, nodes
and snapshots.")]
pub(crate) struct Completion {
    /// Shell
    shell: Shell,
}

/// Script for bash. Colons are breaks between words there, so a path in a sandbox is left alone.
const BASH: &str = r#"# Completion of sandboxctl for bash.
_sandboxctl() {
    local value about
    COMPREPLY=()
    while IFS=$'\t' read -r value about; do
        COMPREPLY+=("$value")
    done < <("${COMP_WORDS[0]}" __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:=] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -o bashdefault -o default -F _sandboxctl sandboxctl
"#;

/// Script for zsh, to be sourced or found in `fpath`.
const ZSH: &str = r#"#compdef sandboxctl
# Completion of sandboxctl for zsh.
_sandboxctl() {
    local line
    local -a found plain
    for line in "${(@f)$("${words[1]}" __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        [[ -n $line ]] || continue
        if [[ ${line%%$'\t'*} == *: ]]; then
            plain+=("${line%%$'\t'*}")
        else
            found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
        fi
    done
    if (( ${#plain} )); then
        compadd -S '' -- $plain
    fi
    if (( ${#found} )); then
        _describe 'sandboxctl' found
    elif (( ! ${#plain} )); then
        _files
    fi
}
if [[ $funcstack[1] == _sandboxctl ]]; then
    _sandboxctl "$@"
else
    compdef _sandboxctl sandboxctl
fi
"#;

/// Script for fish.
const FISH: &str = r#"# Completion of sandboxctl for fish.
function __sandboxctl_complete
    set -l words (commandline -opc)
    set -l program $words[1]
    set -e words[1]
    command $program __complete -- $words (commandline -ct) 2>/dev/null
end
complete -c sandboxctl -a '(__sandboxctl_complete)'
"#;

pub(super) fn run(
    mut definition: Command,
    Completion { shell }: Completion,
    output: Output,
) -> Result<u8, Failure> {
    let asking = match shell {
        Shell::Bash => Some(BASH),
        Shell::Zsh => Some(ZSH),
        Shell::Fish => Some(FISH),
        Shell::Elvish | Shell::PowerShell | _ => None,
    };
    if let Some(script) = asking {
        output.line(script.trim_end())?;
        return Ok(0);
    }
    // Written to memory first: the generator panics when it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut definition, "sandboxctl", &mut script);
    output.line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(0)
}
