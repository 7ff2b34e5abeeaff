//! Issues certificates.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use daemon::peer::{self, BACKDATED};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PublicKeyData, SanType, SerialNumber, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::Error;
use crate::clock::{Clock, SystemClock};

/// Length of a serial number, bytes: random, so that no two are the same.
const SERIAL_BYTES: usize = 16;

/// A CA that can sign.
pub(super) struct Authority {
    pub(super) certificate: String,
    key_pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// End of the CA, which no certificate of it outlives.
    end: SystemTime,
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
    pub(super) role: Role,
}

/// Uses of a leaf certificate's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Serves and calls, as our daemons do.
    Daemon,
    /// Calls only.
    Caller,
}

impl Authority {
    /// Makes a new CA. Its certificate may sign leaf certificates only.
    pub(super) fn new(common: &str, life: Duration) -> Result<Self, Error> {
        let begin = time(&SystemClock);
        let end = begin + life;
        let mut params = params(common, (begin, end));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        Ok(Self { certificate, key_pem, issuer: Issuer::new(params, key), end })
    }

    pub(super) fn load(certificate: String, key_pem: &str) -> Result<Self, Error> {
        let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(key_pem)?)?;
        let unread = |why: String| Error::Authority(why);
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|error| unread(error.to_string()))?;
        let validity = peer::validity(&der).map_err(unread)?;
        let end = UNIX_EPOCH + Duration::from_millis(validity.not_after_ms);
        Ok(Self { certificate, key_pem: key_pem.to_owned(), issuer, end })
    }

    /// Returns true when the time of the CA is over.
    pub(super) fn has_ended(&self) -> bool {
        self.end <= time(&SystemClock)
    }

    pub(super) fn key(&self) -> String {
        self.key_pem.clone()
    }

    /// Issues a leaf certificate with a new key, for server and client authentication.
    pub(super) fn leaf(&self, usage: &Usage<'_>) -> Result<Leaf, Error> {
        self.leaf_by(&SystemClock, usage)
    }

    /// As `leaf`, by this clock.
    pub(super) fn leaf_by(&self, clock: &dyn Clock, usage: &Usage<'_>) -> Result<Leaf, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = self.issue(usage, &key, time(clock))?.pem();
        Ok(Leaf { certificate, key: key.serialize_pem() })
    }

    /// Issues a leaf certificate for the key of a request (PEM). Nothing else of the request counts:
    /// not its names, and not the uses that it asks for. Returns the key, too.
    pub(super) fn sign(
        &self,
        usage: &Usage<'_>,
        request: &str,
    ) -> Result<(Certificate, Vec<u8>), Error> {
        let request = CertificateSigningRequestParams::from_pem(request)
            .map_err(|error| Error::Request(error.to_string()))?;
        let key = request.public_key;
        if PublicKeyData::algorithm(&key) != &PKCS_ECDSA_P256_SHA256 {
            return Err(Error::Request("the key must be ECDSA on P-256".to_owned()));
        }
        let certificate = self.issue(usage, &key, time(&SystemClock))?;
        Ok((certificate, key.der_bytes().to_vec()))
    }

    fn issue(
        &self,
        usage: &Usage<'_>,
        key: &impl PublicKeyData,
        now: SystemTime,
    ) -> Result<Certificate, Error> {
        if self.end <= now {
            return Err(Error::Ended);
        }
        let mut params = params(usage.common, (now, self.end.min(now + usage.life)));
        let mut serial = [0; SERIAL_BYTES];
        getrandom::fill(&mut serial).expect("the kernel gives random bytes");
        // A positive number without leading zeros.
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match usage.role {
            Role::Daemon => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
            Role::Caller => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        for name in usage.names {
            params.subject_alt_names.push(san(name)?);
        }
        if let Some(uri) = &usage.uri {
            params.subject_alt_names.push(SanType::URI(ascii(uri)?));
        }
        Ok(params.signed_by(key, &self.issuer)?)
    }
}

fn time(clock: &dyn Clock) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(clock.now_ms())
}

fn params(common: &str, (begin, end): (SystemTime, SystemTime)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common);
    params.not_before = (begin - BACKDATED).into();
    params.not_after = end.into();
    params
}

pub(super) fn san(name: &str) -> Result<SanType, Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn usage(life: Duration) -> Usage<'static> {
        Usage { common: "x", names: &[], uri: None, life, role: Role::Caller }
    }

    fn end_ms(pem: &str) -> u64 {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
        peer::validity(&der).expect("validity").not_after_ms
    }

    #[test]
    fn no_certificate_outlives_its_ca() {
        let made = Authority::new("test CA", HOUR).expect("made");
        let loaded = Authority::load(made.certificate.clone(), &made.key()).expect("loaded");
        let ca = end_ms(&made.certificate);
        let request = CertificateParams::default()
            .serialize_request(&KeyPair::generate().expect("key"))
            .and_then(|request| request.pem())
            .expect("request");
        for authority in [made, loaded] {
            for (life, within) in [(100 * HOUR, false), (HOUR / 2, true)] {
                let leaf = authority.leaf(&usage(life)).expect("issued").certificate;
                let signed = authority.sign(&usage(life), &request).expect("signed").0.pem();
                for certificate in [leaf, signed] {
                    let end = end_ms(&certificate);
                    assert!(end <= ca && (end < ca) == within, "{life:?}: {end} {ca}");
                }
            }
        }
    }

    #[test]
    fn ca_that_has_ended_signs_nothing() {
        let ended = Authority::new("test CA", Duration::ZERO).expect("made");
        assert!(matches!(ended.leaf(&usage(HOUR)), Err(Error::Ended)));
        let loaded = Authority::load(ended.certificate.clone(), &ended.key()).expect("loaded");
        assert!(matches!(loaded.leaf(&usage(HOUR)), Err(Error::Ended)));
    }
}
