//! The table of sub-commands that an error prints.

const TEXT: &str = "\
USAGE: pct <COMMAND> [ARGS] [OPTIONS]\n\
\n\
\x20      pct clone <vmid> <newid> [OPTIONS]\n\
\x20      pct create <vmid> <ostemplate> [OPTIONS]\n\
\x20      pct destroy <vmid> [OPTIONS]\n\
\x20      pct list \n\
\x20      pct migrate <vmid> <target> [OPTIONS]\n\
\x20      pct move-volume <vmid> <volume> [<storage>] [<target-vmid>] [<target-volume>] [OPTIONS]\n\
\x20      pct pending <vmid>\n\
\x20      pct resize <vmid> <disk> <size> [OPTIONS]\n\
\x20      pct restore <vmid> <ostemplate> [OPTIONS]\n\
\x20      pct template <vmid>\n\
\n\
\x20      pct config <vmid> [OPTIONS]\n\
\x20      pct set <vmid> [OPTIONS]\n\
\n\
\x20      pct delsnapshot <vmid> <snapname> [OPTIONS]\n\
\x20      pct listsnapshot <vmid>\n\
\x20      pct rollback <vmid> <snapname> [OPTIONS]\n\
\x20      pct snapshot <vmid> <snapname> [OPTIONS]\n\
\n\
\x20      pct reboot <vmid> [OPTIONS]\n\
\x20      pct resume <vmid>\n\
\x20      pct shutdown <vmid> [OPTIONS]\n\
\x20      pct start <vmid> [OPTIONS]\n\
\x20      pct stop <vmid> [OPTIONS]\n\
\x20      pct suspend <vmid>\n\
\n\
\x20      pct console <vmid> [OPTIONS]\n\
\x20      pct cpusets \n\
\x20      pct df <vmid>\n\
\x20      pct enter <vmid> [OPTIONS]\n\
\x20      pct exec <vmid> [<extra-args>] [OPTIONS]\n\
\x20      pct fsck <vmid> [OPTIONS]\n\
\x20      pct fstrim <vmid> [OPTIONS]\n\
\x20      pct mount <vmid>\n\
\x20      pct pull <vmid> <path> <destination> [OPTIONS]\n\
\x20      pct push <vmid> <file> <destination> [OPTIONS]\n\
\x20      pct remote-migrate <vmid> [<target-vmid>] <target-endpoint> --target-bridge <string> --target-storage <string> [OPTIONS]\n\
\x20      pct rescan  [OPTIONS]\n\
\x20      pct status <vmid> [OPTIONS]\n\
\x20      pct unlock <vmid>\n\
\x20      pct unmount <vmid>\n\
\n\
\x20      pct help [<extra-args>] [OPTIONS]";

/// Returns the whole table.
pub(crate) fn all() -> String {
    TEXT.to_owned()
}

/// Returns whether the real `pct` has a sub-command of this name.
pub(crate) fn is_command(name: &str) -> bool {
    let names = TEXT.lines().filter_map(|line| line.trim_start().strip_prefix("pct "));
    names.filter_map(|line| line.split(' ').next()).any(|known| known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subcommand_names_are_known() {
        assert!(is_command("clone") && is_command("remote-migrate") && !is_command("nosuch"));
        assert!(all().starts_with("USAGE: pct <COMMAND>"));
    }
}
