//! Renders cloudflared's configuration. Pure.
//!
//! The rules are static: all names of sandboxes lead to this node's Caddy, which asks the agent. So a sandbox that
//! comes or goes changes nothing here, and cloudflared, which reads its file at its start only, is never restarted
//! on its account.

use std::{fmt::Write as _, net::SocketAddr, path::Path};

use super::settings::{Hostname, Settings};

/// Parts of the agent's configuration that cloudflared's follows.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Domain of the sandboxes' host names.
    pub domain: Hostname,
    /// Address of this node's Caddy.
    pub caddy: SocketAddr,
    /// CA of the controller, PEM.
    pub ca: std::path::PathBuf,
}

/// Renders the configuration.
pub fn render(settings: &Settings, origin: &Origin) -> String {
    let mut text = format!(
        "# Written by pve-sandbox-agent from its own settings. A change by hand is put back.\n\
         tunnel: {}\n\
         no-autoupdate: true\n\
         metrics: {}\n\
         grace-period: 10s\n\
         originRequest:\n  connectTimeout: 5s\n\
         ingress:\n",
        quoted(&settings.tunnel.to_string()),
        quoted(&settings.metrics.to_string()),
    );
    // Before the wildcard, which would take it.
    if let Some(controller) = &settings.controller {
        let rule = format!(
            "  - hostname: {}\n    service: {}\n    originRequest:\n      caPool: {}\n",
            quoted(controller.host.as_str()),
            quoted(&format!("https://{}", controller.address)),
            quoted_path(&origin.ca),
        );
        text.push_str(&rule);
    }
    let wildcard = format!(
        "  - hostname: {}\n    service: {}\n  - service: http_status:404\n",
        quoted(&origin.domain.wildcard()),
        quoted(&format!("http://{}", origin.caddy)),
    );
    text.push_str(&wildcard);
    text
}

/// Returns a text of ours in quotes. All of it is ASCII without quotes: ids, host names, addresses.
fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// Returns an operator's path in quotes.
fn quoted_path(path: &Path) -> String {
    let mut quoted = String::from("\"");
    for c in path.to_string_lossy().chars() {
        match c {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(c);
            }
            c if c.is_control() => {
                // Writing to a string cannot fail.
                write!(quoted, "\\u{:04x}", u32::from(c)).ok();
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        super::settings::{Controller, METRICS},
        *,
    };

    pub(in crate::tunnel) fn settings() -> Settings {
        Settings {
            name: "pve-sandbox-example-com".into(),
            tunnel: "f70ff985-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("an id"),
            account: "699d98642c564d2e855e9661899b7252".parse().expect("an id"),
            zone: "023e105f4ecef8ad9ca31a8372d0c353".parse().expect("an id"),
            zone_name: Some("example.com".into()),
            domain: "example.com".parse().expect("a host name"),
            controller: None,
            metrics: METRICS,
            earlier: Vec::new(),
        }
    }

    pub(in crate::tunnel) fn origin() -> Origin {
        Origin {
            domain: "example.com".parse().expect("a host name"),
            caddy: ([127, 0, 0, 1], 8480).into(),
            ca: "/etc/pve-sandbox/tls/ca.crt".into(),
        }
    }

    #[test]
    fn rendered_configuration_is_the_tested_one() {
        let controller = Controller {
            host: "api.example.com".parse().expect("a host name"),
            address: "192.0.2.11:7443".parse().expect("an address"),
        };
        let settings = Settings { controller: Some(controller), ..settings() };
        insta::assert_snapshot!(render(&settings, &origin()));
    }

    #[test]
    fn rule_of_the_controller_comes_before_the_wildcard_and_the_last_rule_takes_the_rest() {
        let text = render(&settings(), &origin());
        assert!(!text.contains("https://") && !text.contains("caPool"), "{text}");
        assert!(text.ends_with("  - service: http_status:404\n"), "{text}");
        // Credentials are handed over by systemd: the file names no path of theirs.
        assert!(!text.contains("credentials"), "{text}");
    }

    #[test]
    fn path_of_an_operator_stays_one_word() {
        assert_eq!(quoted_path(Path::new("/a b\"c\\d\n")), r#""/a b\"c\\d\u000a""#);
    }
}
