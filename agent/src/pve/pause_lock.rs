//! PVE's config lock, held while a sandbox is paused: a snapshot or a backup of a frozen container
//! would hang, and with it every `pct` of the node. Pure.
//!
//! The lock has the name of a backup's lock, because PVE knows no other that fits. A line in the
//! description distinguishes the two: it is written and removed together with the lock, and
//! explains the lock to operators.

use super::{ContainerConfig, ErrorKind, Result};

/// PVE's name of the lock.
const LOCK: &str = "backup";
/// Line in the description. Without a colon, because PVE would encode it.
const NOTE: &str = "paused by pve-sandbox, which holds the lock; resume it with sandboxctl";

/// True when the lock is held and is ours.
pub fn is_held(config: &ContainerConfig) -> bool {
    config.lock() == Some(LOCK) && config.has_note(NOTE)
}

/// True when our line is there, also without the lock: an operator's `pct unlock` leaves it.
pub fn is_noted(config: &ContainerConfig) -> bool {
    config.has_note(NOTE)
}

/// Takes the lock. Fails when somebody else holds one.
pub fn acquire(config: &mut ContainerConfig) -> Result<()> {
    if is_held(config) {
        return Ok(());
    }
    if let Some(lock) = config.lock() {
        return Err(ErrorKind::Locked(format!("CT is locked ({lock})")));
    }
    config.add_note(NOTE);
    config.set("lock", LOCK).map_err(|unfit| ErrorKind::Failed(unfit.to_string()))
}

/// Releases the lock, if it is ours.
pub fn release(config: &mut ContainerConfig) -> Result<()> {
    if !is_noted(config) {
        return Ok(());
    }
    match config.lock() {
        Some(LOCK) => config.remove("lock"),
        // The holder of this lock writes the config when it is done.
        Some(lock) => return Err(ErrorKind::Locked(format!("CT is locked ({lock})"))),
        None => {}
    }
    config.remove_note(NOTE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "#pve-sandbox v1\n#an operator's%3A line\narch: amd64\nhostname: x\n\
        unknown_to_us:  as it is \nrootfs: local:100/x.raw,size=1G\n\n[snap]\n#of the snapshot\nlock: x\n";

    fn parsed(text: &str) -> ContainerConfig {
        ContainerConfig::parse(text.as_bytes())
    }

    #[test]
    fn taking_and_giving_back_the_lock_keeps_every_other_byte() {
        let before = parsed(CONFIG);
        let mut config = before.clone();
        acquire(&mut config).expect("free");
        assert!(is_held(&config) && config.lock() == Some("backup"));
        let text = String::from_utf8(config.to_bytes()).expect("text");
        assert!(text.contains("\nunknown_to_us:  as it is \n"), "{text}");
        assert!(text.contains("\n#an operator's%3A line\n#paused by"), "{text}");
        let locked = config.clone();
        acquire(&mut config).expect("ours already");
        assert_eq!(config, locked);
        release(&mut config).expect("ours");
        assert_eq!(config, before);
        release(&mut config).expect("nothing to do");
        assert_eq!(config, before);
    }

    #[test]
    fn foreign_lock_is_neither_taken_nor_removed() {
        for lock in ["backup", "snapshot", "disk"] {
            let mut config = parsed(&format!("arch: amd64\nlock: {lock}\n"));
            let before = config.clone();
            assert!(matches!(acquire(&mut config), Err(ErrorKind::Locked(_))), "{lock}");
            release(&mut config).expect("none of ours");
            assert_eq!(config, before);
        }
    }

    #[test]
    fn lock_changed_by_an_operator_is_not_taken_for_ours() {
        let mut config = parsed(CONFIG);
        acquire(&mut config).expect("free");
        config.remove("lock");
        assert!(!is_held(&config) && is_noted(&config));
        let mut other = config.clone();
        other.set("lock", "snapshot").expect("fits");
        assert!(matches!(release(&mut other), Err(ErrorKind::Locked(_))));
        release(&mut config).expect("the line alone");
        assert_eq!(config, parsed(CONFIG));
    }
}
