//! Decides about Debian's own `caddy.service`. apt enables and starts it where Caddy comes as a package that
//! ours recommends: then it serves a welcome page on port 80, and its administration on port 2019, and nobody
//! has asked for it. A Caddy that somebody else uses is left alone.

/// Unit of Debian's package.
pub const UNIT: &str = "caddy.service";

/// Observations of Debian's Caddy on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Output of `systemctl is-enabled caddy.service`; empty where there is no such unit.
    pub enabled: String,
    /// Output of `systemctl is-active caddy.service`.
    pub active: String,
    /// Output of `apt-mark showauto caddy`: its name where apt has installed it for another package.
    pub automatic: String,
    /// Output of `dpkg --verify caddy`: a line for each file that was changed; `None`: not known.
    pub changed: Option<String>,
}

/// Decision about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// There is none, or it does not run and will not.
    Nothing,
    /// Stop it, and keep it from starting.
    Mask,
    /// Somebody uses it; the reason.
    LeaveAlone(&'static str),
}

/// Decides.
pub fn decide(facts: &Facts) -> Decision {
    let runs = matches!(facts.active.trim(), "active" | "activating" | "reloading");
    let starts = facts.enabled.trim().starts_with("enabled");
    if !runs && !starts {
        return Decision::Nothing;
    }
    if facts.automatic.trim() != "caddy" {
        return Decision::LeaveAlone("it was installed by name");
    }
    match &facts.changed {
        None => Decision::LeaveAlone("nobody knows whether its configuration was changed"),
        Some(changed) if !changed.trim().is_empty() => {
            Decision::LeaveAlone("its configuration was changed")
        }
        Some(_) => Decision::Mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought_by_apt() -> Facts {
        Facts {
            enabled: "enabled\n".into(),
            active: "active\n".into(),
            automatic: "caddy\n".into(),
            changed: Some(String::new()),
        }
    }

    #[test]
    fn untouched_caddy_that_came_with_our_package_is_masked() {
        assert_eq!(decide(&brought_by_apt()), Decision::Mask);
        let stopped = Facts { active: "failed\n".into(), ..brought_by_apt() };
        assert_eq!(decide(&stopped), Decision::Mask, "a boot would start it");
    }

    #[test]
    fn caddy_that_somebody_uses_is_left_alone() {
        let by_name = Facts { automatic: String::new(), ..brought_by_apt() };
        let edited = "??5?????? c /etc/caddy/Caddyfile\n";
        let changed = Facts { changed: Some(edited.into()), ..brought_by_apt() };
        let unknown = Facts { changed: None, ..brought_by_apt() };
        for facts in [by_name, changed, unknown] {
            assert!(matches!(decide(&facts), Decision::LeaveAlone(_)), "{facts:?}");
        }
    }

    #[test]
    fn caddy_that_neither_runs_nor_starts_needs_nothing() {
        for enabled in ["", "disabled\n", "masked\n"] {
            let facts =
                Facts { enabled: enabled.into(), active: "inactive\n".into(), ..brought_by_apt() };
            assert_eq!(decide(&facts), Decision::Nothing, "{enabled}");
        }
    }
}
