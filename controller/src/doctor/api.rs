//! Listener of the API: whether it is this controller, with the certificate that is on the disk, and in charge of the
//! nodes. `look` connects, `check` decides and is pure.

use std::path::Path;

use daemon::{
    doctor::{
        Check,
        reach::{Listener, PATIENCE, listener, local},
    },
    peer::CONTROLLER_NAME,
    systemctl,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::RESTART;
use crate::{ca, config::Config, rpc};

/// Unit of the controller.
const UNIT: &str = "pve-sandbox-controller";
/// Program that knows which units run.
const SYSTEMCTL: &str = "/usr/bin/systemctl";

/// Observations of the address where the API should be.
#[derive(Debug)]
pub(super) struct Facts {
    listener: Listener,
    /// Certificate on the disk, DER.
    on_disk: Vec<u8>,
    /// Whether a later controller is in charge; `None` where the listener does not tell.
    is_replaced: Option<bool>,
    /// Whether a boot starts its unit; `None` where that is unknown, or the unit does not run.
    starts_at_boot: Option<bool>,
}

/// Looks at the listener; `None` without a CA.
pub(super) async fn look(config: &Config) -> Option<Facts> {
    let files = ca::Files::new(&config.data_dir);
    let tls = daemon::tls::client_with_roots(&files.ca()).ok()?;
    let address = local(config.listen);
    let listener = listener(address, CONTROLLER_NAME, tls.clone()).await;
    let (is_replaced, at_boot) = match &listener {
        Listener::Accepted(_) => {
            (rpc::is_replaced(address, tls).await, look_at_boot(Path::new(SYSTEMCTL)).await)
        }
        Listener::Nobody | Listener::Other(_) => (None, None),
    };
    let pem = daemon::text::read(&files.certificate()).unwrap_or_default();
    let on_disk = CertificateDer::from_pem_slice(pem.as_bytes());
    let on_disk = on_disk.map(|der| der.to_vec()).unwrap_or_default();
    Some(Facts { listener, on_disk, is_replaced, starts_at_boot: at_boot })
}

/// Returns whether a boot starts the unit, which runs. `is-enabled` answers from the files, also where systemd does not
/// run the machine; `is-active` does not, so it is asked first.
async fn look_at_boot(program: &Path) -> Option<bool> {
    let active = systemctl::ask(program, &["is-active", UNIT], PATIENCE).await.ok()?;
    if !matches!(active.stdout.trim(), "active" | "reloading") {
        return None;
    }
    let enabled = systemctl::ask(program, &["is-enabled", UNIT], PATIENCE).await.ok()?;
    systemctl::starts_at_boot(&enabled.stdout)
}

/// Judges the listener.
pub(super) fn check(config: &Config, facts: &Facts) -> Check {
    const NAME: &str = "api";
    let address = local(config.listen);
    let subject = address.to_string();
    match &facts.listener {
        Listener::Nobody => Check::failed(
            NAME,
            subject,
            "nothing listens: the controller does not run",
            "systemctl enable --now pve-sandbox-controller; why it ended: journalctl -u \
             pve-sandbox-controller -n 20",
        ),
        Listener::Other(why) => Check::failed(
            NAME,
            subject,
            format!("something listens that is not this controller, or has another CA: {why}"),
            format!("ss -ltnp 'sport = :{}' shows what does", address.port()),
        ),
        Listener::Accepted(_) if facts.is_replaced == Some(true) => Check::failed(
            NAME,
            subject,
            "a later controller is in charge of the nodes: this one changes nothing any more",
            format!(
                "systemctl disable --now pve-sandbox-controller, on the machine of the controller that is not to \
                 be in charge; if that is the other one, then here: {RESTART}"
            ),
        ),
        Listener::Accepted(shown) if *shown != facts.on_disk => Check::warning(
            NAME,
            subject,
            "it serves with another certificate than the one on the disk",
            RESTART,
        ),
        Listener::Accepted(_) if facts.starts_at_boot == Some(false) => Check::warning(
            NAME,
            subject,
            "it runs, but a boot does not start it",
            format!("systemctl enable {UNIT}"),
        ),
        Listener::Accepted(_) => Check::ok(NAME, subject, "it answers"),
    }
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    #[test]
    fn replaced_controller_and_another_certificate_are_found() {
        let config = Config::parse(Path::new("controller.toml"), "url_template = \"\"\n");
        let config = config.expect("valid");
        let judge = |shown: &[u8], is_replaced| {
            let listener = Listener::Accepted(shown.to_vec());
            check(&config, &Facts { listener, on_disk: vec![1], is_replaced, starts_at_boot: None })
        };
        for unsuspicious in [Some(false), None] {
            assert_eq!(judge(&[1], unsuspicious).state, State::Ok);
            assert_eq!(judge(&[2], unsuspicious).state, State::Warning);
        }
        for shown in [[1], [2]] {
            let found = judge(&shown, Some(true));
            assert_eq!(found.state, State::Failed, "{found:?}");
            assert!(found.found.contains("later controller"), "{found:?}");
            assert!(found.remedy.is_some_and(|text| text.starts_with("systemctl disable --now")));
        }
    }

    #[test]
    fn controller_that_a_boot_does_not_start_is_a_warning() {
        let config = Config::parse(Path::new("controller.toml"), "url_template = \"\"\n");
        let config = config.expect("valid");
        let judge = |starts_at_boot| {
            let listener = Listener::Accepted(vec![1]);
            let is_replaced = Some(false);
            check(&config, &Facts { listener, on_disk: vec![1], is_replaced, starts_at_boot })
        };
        for unsuspicious in [Some(true), None] {
            assert_eq!(judge(unsuspicious).state, State::Ok);
        }
        let found = judge(Some(false));
        assert_eq!(found.state, State::Warning);
        assert_eq!(found.found, "it runs, but a boot does not start it");
        assert_eq!(found.remedy.as_deref(), Some("systemctl enable pve-sandbox-controller"));
    }
}
