//! Finds the account and the zone of a tunnel, and says what of them will not work.

use super::Error;
use crate::tunnel::{
    api::{self, Api, model::Zone},
    ids::CloudId,
    settings::Hostname,
};

/// Account and zone.
#[derive(Debug, Clone)]
pub(in crate::tunnel) struct Place {
    pub(in crate::tunnel) account: CloudId,
    pub(in crate::tunnel) zone: CloudId,
    /// Name of the zone; `None` where the token may not read it.
    pub(in crate::tunnel) zone_name: Option<String>,
    /// Remarks for the operator.
    pub(in crate::tunnel) notes: Vec<String>,
}

/// Zone and account, as far as they are known before.
#[derive(Debug, Clone, Copy)]
pub(in crate::tunnel) struct Known<'a> {
    /// Zone that an operator gives.
    pub(in crate::tunnel) zone: Option<&'a CloudId>,
    /// Account that an operator gives.
    pub(in crate::tunnel) account: Option<&'a CloudId>,
    /// Zone of an earlier setup: counts where several zones are equally good.
    pub(in crate::tunnel) before: Option<&'a CloudId>,
}

/// Finds them: what is given counts, the rest is looked up.
pub(in crate::tunnel) async fn find(
    api: &Api,
    domain: &Hostname,
    known: Known<'_>,
) -> Result<Place, Error> {
    let Known { zone, account, before } = known;
    if let Some(account) = account {
        api.know_account(account);
    }
    let found = match zone {
        None => Some(choose(api.zones_of(domain).await?, domain, account, before)?),
        Some(id) => match api.zone(id).await {
            Ok(found) => Some(found),
            // Its name is for remarks alone.
            Err(api::Error::Lacks { .. }) if account.is_some() => None,
            Err(error) => return Err(error.into()),
        },
    };
    if let Some(found) = &found {
        refuse_foreign(found, domain, account)?;
    }
    let notes = found.as_ref().map(|zone| notes(zone, domain)).unwrap_or_default();
    let of_zone = found.as_ref().map(|zone| &zone.account.id);
    let (Some(account), Some(zone)) =
        (account.or(of_zone), zone.or(found.as_ref().map(|zone| &zone.id)))
    else {
        return Err(Error::NoZone(domain.clone()));
    };
    api.know_account(account);
    Ok(Place {
        account: account.clone(),
        zone: zone.clone(),
        zone_name: found.as_ref().map(|zone| zone.name.clone()),
        notes,
    })
}

/// Chooses among zones of one name, which different accounts can have: those of the given account, of these the active
/// ones, and of these the one of an earlier setup. Pure.
fn choose(
    zones: Vec<Zone>,
    domain: &Hostname,
    account: Option<&CloudId>,
    before: Option<&CloudId>,
) -> Result<Zone, Error> {
    let zones = preferred(zones, |zone| Some(&zone.account.id) == account);
    let zones = preferred(zones, |zone| zone.status == ACTIVE);
    let zones = preferred(zones, |zone| Some(&zone.id) == before);
    match <[Zone; 1]>::try_from(zones) {
        Ok([zone]) => Ok(zone),
        Err(none) if none.is_empty() => Err(Error::NoZone(domain.clone())),
        Err(several) => Err(Error::SeveralZones(several)),
    }
}

/// Returns the zones that fit, or all where none does.
fn preferred(zones: Vec<Zone>, fits: impl Fn(&Zone) -> bool) -> Vec<Zone> {
    if !zones.iter().any(&fits) {
        return zones;
    }
    zones.into_iter().filter(fits).collect()
}

/// State of a zone whose name servers the domain has.
const ACTIVE: &str = "active";

/// Refuses a zone that is not the domain's, or does not belong to the account that was given.
fn refuse_foreign(zone: &Zone, domain: &Hostname, account: Option<&CloudId>) -> Result<(), Error> {
    if !domain.is_in(&zone.name) {
        return Err(Error::OtherZone { zone: zone.name.clone(), domain: domain.clone() });
    }
    match account {
        // A record reaches only tunnels of its zone's account.
        Some(given) if *given != zone.account.id => Err(Error::OtherAccount {
            zone: zone.name.clone(),
            given: given.clone(),
            account: zone.account.id.clone(),
        }),
        Some(_) | None => Ok(()),
    }
}

/// Says what of a zone keeps the URLs from working. Pure.
fn notes(zone: &Zone, domain: &Hostname) -> Vec<String> {
    let mut notes = Vec::new();
    if zone.status != ACTIVE {
        let servers = zone.name_servers.clone().unwrap_or_default().join(" and ");
        notes.push(format!(
            "the zone {} is {}: its domain must have the name servers {servers}",
            zone.name, zone.status
        ));
    }
    if zone.kind == "partial" {
        notes.push(format!(
            "the zone {} is a partial one (CNAME setup): Cloudflare makes no wildcard certificate for it",
            zone.name
        ));
    }
    // Universal SSL covers the zone's name and one label before it.
    if domain.as_str() != zone.name {
        notes.push(certificate(&format!("*.{domain}"), &zone.name));
    }
    notes
}

/// Says that a name is too deep for the certificate that each zone has.
pub(super) fn certificate(name: &str, zone: &str) -> String {
    format!(
        "Cloudflare's free certificate covers {zone} and *.{zone}, and not {name}: browsers refuse these names \
         until you order an advanced certificate for {name} (SSL/TLS > Edge Certificates), or use a domain that is a \
         zone of its own"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::api::model::Account;

    fn zone() -> Zone {
        Zone {
            id: "023e105f4ecef8ad9ca31a8372d0c353".parse().expect("an id"),
            name: "example.com".into(),
            status: "active".into(),
            kind: "full".into(),
            account: Account { id: "699d98642c564d2e855e9661899b7252".parse().expect("an id") },
            name_servers: Some(vec!["a.ns.test".into(), "b.ns.test".into()]),
        }
    }

    #[test]
    fn zone_is_chosen_by_account_then_by_state_then_by_an_earlier_setup() {
        let id = |digit: &str| digit.repeat(32).parse::<CloudId>().expect("an id");
        let zone = |number: &str, account: &str, status: &str| Zone {
            id: id(number),
            status: status.into(),
            account: Account { id: id(account) },
            ..zone()
        };
        let domain = "example.com".parse::<Hostname>().expect("a host name");
        let chosen = |zones: &[Zone], account: Option<&str>, before: Option<&str>| {
            let (account, before) = (account.map(id), before.map(id));
            let chosen = choose(zones.to_vec(), &domain, account.as_ref(), before.as_ref());
            chosen.map(|zone| zone.id).map_err(|error| error.to_string())
        };
        let moved = [zone("1", "a", "moved"), zone("2", "b", "active")];
        assert_eq!(chosen(&moved, None, None), Ok(id("2")), "the active one, not the first");
        assert_eq!(chosen(&moved, None, Some("1")), Ok(id("2")), "whatever was set up before");
        assert_eq!(chosen(&moved, Some("a"), None), Ok(id("1")), "the account's own");
        assert_eq!(chosen(&moved, Some("c"), None), Ok(id("2")));

        let equal = [zone("1", "a", "active"), zone("2", "b", "active"), zone("3", "b", "moved")];
        assert_eq!(chosen(&equal, Some("b"), None), Ok(id("2")));
        assert_eq!(chosen(&equal, None, Some("2")), Ok(id("2")));
        let told = chosen(&equal, None, Some("3")).expect_err("two are left");
        for word in [&id("1"), &id("2"), &id("a"), &id("b")].map(ToString::to_string) {
            assert!(told.contains(&word), "{word}: {told}");
        }
        let is_told = told.contains("--zone-id") && !told.contains(&id("3").to_string());
        assert!(is_told, "{told}");
        assert!(chosen(&[], None, None).expect_err("none").contains("sees no zone"));
    }

    #[test]
    fn zone_that_will_not_work_is_told() {
        let domain = |text: &str| text.parse::<Hostname>().expect("a host name");
        assert_eq!(notes(&zone(), &domain("example.com")), [""; 0]);
        let deep = notes(&zone(), &domain("sbx.example.com"));
        assert!(
            deep[0].contains("not *.sbx.example.com") && deep[0].contains("advanced"),
            "{deep:?}"
        );
        let pending = Zone { status: "pending".into(), ..zone() };
        assert!(notes(&pending, &domain("example.com"))[0].contains("a.ns.test and b.ns.test"));
        let partial = Zone { kind: "partial".into(), ..zone() };
        assert!(notes(&partial, &domain("example.com"))[0].contains("no wildcard certificate"));
    }
}
