//! Decides whether Caddy can use the certificate of the operator's own now.

use std::path::Path;

use super::Keeper;
use crate::{
    clock::Clock as _,
    ingress::{
        own_certificate,
        settings::{AcmeDns, Certificate, Settings},
        version::{Generation, Version},
    },
};

impl Keeper {
    /// Returns the settings as far as Caddy can use them now: without the listener with a certificate of the
    /// operator's own, where there is no certificate; and what is wrong with it.
    pub(super) async fn usable(&self, version: Option<Version>) -> (Settings, Option<String>) {
        let generation = version.map_or(Generation::Before, Version::generation);
        let mut settings = Settings { generation, ..self.settings.clone() };
        let Some(secure) = &settings.secure else { return (settings, None) };
        let copy = Path::new(secure.certificate.copy().as_str());
        let (is_usable, flaw) = match &secure.certificate {
            Certificate::Files(files) => {
                let (domain, now_ms) = (&settings.domain, self.clock.now_ms());
                let taken = own_certificate::refresh(files, domain, self.group(), now_ms);
                (copy.exists(), taken.err().map(|flaw| flaw.to_string()))
            }
            Certificate::Acme(acme) => match self.lack(acme, version).await {
                Ok(Some(why)) => (false, Some(why)),
                Ok(None) => {
                    let taken = own_certificate::refresh_token(&acme.token, copy, self.group());
                    (copy.exists(), taken.err().map(|flaw| flaw.to_string()))
                }
                Err(why) => (copy.exists(), Some(why)),
            },
        };
        if !is_usable {
            settings.secure = None;
        }
        let flaw = flaw.map(|why| match is_usable {
            true => format!("ingress.certificate: the one before stays in use: {why}"),
            false => format!("ingress.certificate: Caddy runs without it: {why}"),
        });
        (settings, flaw)
    }

    /// Returns why Caddy can get no certificate by itself; `None` when it can.
    ///
    /// # Errors
    /// When Caddy does not tell.
    async fn lack(
        &self,
        acme: &AcmeDns,
        version: Option<Version>,
    ) -> Result<Option<String>, String> {
        let (path, module) = (self.caddy.path.display().to_string(), acme.module());
        let version = version.ok_or_else(|| "Caddy does not tell its version".to_owned())?;
        match self.caddy.has_module(&module).await {
            Ok(false) => Ok(Some(without_module(&path, &module))),
            Ok(true) if version < Version::READS_FILES => {
                let needed = Version::READS_FILES;
                Ok(Some(format!("{path} is {version}: ACME by DNS needs {needed} or later")))
            }
            Ok(true) => Ok(None),
            Err(error) => Err(format!("Caddy does not list its modules: {error}")),
        }
    }
}

/// Says that Caddy has not the module for a provider, and what to do.
pub fn without_module(program: &str, module: &str) -> String {
    format!(
        "{program} was built without the module {module}, as Debian's Caddy is: install one with it \
         (https://caddyserver.com/download) there, or name a certificate that another program renews by cert and key"
    )
}
