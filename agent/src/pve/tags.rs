//! The tag that every sandbox carries, so that operators can filter PVE's GUI. The agent draws no
//! conclusion from it: anybody can set a tag. Pure.

use super::ContainerConfig;

/// Name of the tag.
pub const TAG: &str = "pve-sandbox";
/// Line in the description of an adopted container that had no such tag before: the tag is removed
/// with it when the container is released.
const NOTE: &str = "the tag pve-sandbox came with pve-sandbox and goes with it";

/// Adds the tag to those that a sandbox has from its template, sorted as PVE writes them.
pub fn put(config: &mut ContainerConfig) {
    let mut tags: Vec<&str> = config.tags().chain([TAG]).collect();
    tags.sort_unstable();
    tags.dedup();
    let tags = tags.join(";");
    if config.get("tags") != Some(&tags) {
        // Cannot fail: tags from a config are words of one line.
        drop(config.set("tags", &tags));
    }
}

/// Adds the tag to an adopted container, and a line to record that. Keeps every other byte.
pub fn add(config: &mut ContainerConfig) {
    if config.tags().any(|tag| tag == TAG) {
        return;
    }
    match config.get("tags").map(str::to_owned) {
        Some(tags) => config.replace("tags", &format!("{tags};{TAG}")),
        None => drop(config.set("tags", TAG)),
    }
    config.add_note(NOTE);
}

/// Removes the tag, if `add` added it.
pub fn take_off(config: &mut ContainerConfig) {
    if !config.has_note(NOTE) {
        return;
    }
    config.remove_note(NOTE);
    let Some(tags) = config.get("tags").map(str::to_owned) else { return };
    // Restores the earlier text, unless PVE has sorted the tags since.
    let before = tags.strip_suffix(TAG).and_then(|tags| tags.strip_suffix(';'));
    let rest = match before {
        Some(before) => before.to_owned(),
        None => config.tags().filter(|tag| *tag != TAG).collect::<Vec<_>>().join(";"),
    };
    if rest.is_empty() {
        config.remove("tags");
    } else {
        config.replace("tags", &rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> ContainerConfig {
        ContainerConfig::parse(text.as_bytes())
    }

    #[test]
    fn our_tag_is_put_beside_the_templates_tags() {
        for (before, after) in [
            ("arch: amd64\n", "arch: amd64\ntags: pve-sandbox\n"),
            ("tags: web;a\nunprivileged: 1\n", "tags: a;pve-sandbox;web\nunprivileged: 1\n"),
            ("tags: pve-sandbox;web\n", "tags: pve-sandbox;web\n"),
        ] {
            let mut config = parsed(before);
            put(&mut config);
            assert_eq!(config, parsed(after));
        }
    }

    #[test]
    fn added_tag_is_removed_byte_for_byte() {
        for text in [
            "arch: amd64\nhostname: x\n",
            "#a line\nhostname: x\narch: amd64\ntags:  b; a \nunprivileged: 1\n\n[snap]\ntags: z\n",
            "hostname: x\ntags: web\n",
            // The tag was there before: it stays.
            "hostname: x\ntags: pve-sandbox\n",
        ] {
            let before = parsed(text);
            let mut config = before.clone();
            add(&mut config);
            assert!(config.tags().any(|tag| tag == TAG), "{config:?}");
            let tagged = config.clone();
            add(&mut config);
            assert_eq!(config, tagged, "once");
            take_off(&mut config);
            assert_eq!(config, before);
            take_off(&mut config);
            assert_eq!(config, before, "only what was added");
        }
    }

    #[test]
    fn tags_changed_by_an_operator_stay() {
        let mut config = parsed("hostname: x\ntags: web\n");
        add(&mut config);
        config.set("tags", "a;pve-sandbox;web").expect("fits");
        take_off(&mut config);
        assert_eq!(config.get("tags"), Some("a;web"));
        let mut config = parsed("hostname: x\n");
        add(&mut config);
        config.remove("tags");
        take_off(&mut config);
        assert_eq!(config, parsed("hostname: x\n"));
    }
}
