//! Issues certificates.

use std::{net::IpAddr, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, string::Ia5String,
};

use super::Error;
use crate::clock::{Clock, SystemClock};

/// Backdating of certificates, because clocks of nodes may be behind.
const SKEW: Duration = Duration::from_hours(1);

/// A CA that can sign.
pub(super) struct Authority {
    pub(super) certificate: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, PEM.
pub(super) struct Leaf {
    pub(super) certificate: String,
    pub(super) key: String,
}

/// Contents of a leaf certificate.
pub(super) struct Usage<'a> {
    pub(super) common: &'a str,
    /// Host names and addresses.
    pub(super) names: &'a [String],
    /// URI that identifies the daemon.
    pub(super) uri: Option<String>,
    pub(super) life: Duration,
}

impl Authority {
    /// Makes a new CA. Its certificate may sign leaf certificates only.
    pub(super) fn new(common: &str, life: Duration) -> Result<Self, Error> {
        let mut params = params(common, life);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { certificate, key_pem, issuer: Issuer::new(params, key) })
    }

    pub(super) fn load(certificate: String, key_pem: &str) -> Result<Self, Error> {
        let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(key_pem)?)?;
        Ok(Self { certificate, key_pem: key_pem.to_owned(), issuer })
    }

    pub(super) fn key(&self) -> String {
        self.key_pem.clone()
    }

    /// Issues a leaf certificate for server and client authentication.
    pub(super) fn leaf(&self, usage: &Usage<'_>) -> Result<Leaf, Error> {
        let mut params = params(usage.common, usage.life);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        for name in usage.names {
            params.subject_alt_names.push(san(name)?);
        }
        if let Some(uri) = &usage.uri {
            params.subject_alt_names.push(SanType::URI(ascii(uri)?));
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Leaf { certificate, key: key.serialize_pem() })
    }
}

fn params(common: &str, life: Duration) -> CertificateParams {
    let now = std::time::UNIX_EPOCH + Duration::from_millis(SystemClock.now_ms());
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    params.not_before = (now - SKEW).into();
    params.not_after = (now + life).into();
    params
}

fn san(name: &str) -> Result<SanType, Error> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(SanType::DnsName(ascii(name)?))
}

fn ascii(text: &str) -> Result<Ia5String, Error> {
    Ia5String::try_from(text).map_err(|_| Error::Name(text.to_owned()))
}
