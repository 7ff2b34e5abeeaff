//! Finds what earlier setups of this node have left at Cloudflare: another domain, zone or name has another tunnel or
//! other records, and the earlier ones stay until somebody removes them.

use daemon::chain::Chain;

use crate::tunnel::{
    api::{self, Api},
    ids::{CloudId, TunnelId},
    look, record,
    settings::{EARLIER_MAX, Footprint, Settings},
    teller::Teller,
};

/// Setup of now.
#[derive(Debug)]
pub(super) struct Now<'a> {
    /// Tunnel; `None` while it is still to be made.
    pub(super) tunnel: Option<&'a TunnelId>,
    /// Zone of its records.
    pub(super) zone: &'a CloudId,
    /// Names whose records this setup makes right.
    pub(super) names: &'a [String],
}

impl Now<'_> {
    /// Returns true for a place that `teardown` looks at anyway.
    fn is(&self, place: &Footprint) -> bool {
        self.tunnel == Some(&place.tunnel) && *self.zone == place.zone
    }
}

/// Tells what is left of the setups before, and how it goes; returns where `teardown --everything` has still to look:
/// also where nothing could be found out.
pub(super) async fn tell(
    before: Option<&Settings>,
    now: &Now<'_>,
    api: &Api,
    teller: &mut Teller<'_>,
) -> Vec<Footprint> {
    let mut kept = Vec::new();
    for place in candidates(before, now) {
        match left(&place, now, api).await {
            Ok(left) if left.is_empty() => continue,
            Ok(left) => teller.note(&format!(
                "an earlier setup, for {}, has left at Cloudflare: {}; other nodes may still use it; once none does, \
                 delete it in Cloudflare's dashboard to remove it alone; `pve-sandbox-agent tunnel teardown \
                 --everything --token-file FILE` removes it together with the tunnel of now",
                place.domain,
                left.join(", ")
            )),
            Err(error) => teller.note(&format!(
                "an earlier setup had {place}; whether that is still at Cloudflare is not known: {}; \
                 `pve-sandbox-agent tunnel teardown --everything --token-file FILE` looks there again",
                Chain(&error)
            )),
        }
        if !now.is(&place) {
            kept.push(place);
        }
    }
    let too_many = kept.len().saturating_sub(EARLIER_MAX);
    for place in kept.drain(..too_many) {
        teller.note(&format!(
            "this node remembers {EARLIER_MAX} earlier setups, and forgets {place}: delete that in Cloudflare's \
             dashboard, if nobody needs it"
        ));
    }
    kept
}

/// Lists the places where something may be left. Pure.
fn candidates(before: Option<&Settings>, now: &Now<'_>) -> Vec<Footprint> {
    let Some(before) = before else { return Vec::new() };
    let own = before.footprint();
    let mut places = before.earlier.clone();
    // Another domain, or another name of the controller, leaves a record that leads to the very tunnel of now.
    let is_as_before =
        now.is(&own) && look::names(before).iter().all(|name| now.names.contains(name));
    if !is_as_before {
        places.retain(|place| !place.is_same_place(&own));
        places.push(own);
    }
    places
}

/// Looks at what is left in one place, for people.
async fn left(place: &Footprint, now: &Now<'_>, api: &Api) -> Result<Vec<String>, api::Error> {
    let Footprint { name, tunnel, account, zone, .. } = place;
    let mut left = Vec::new();
    if now.tunnel != Some(tunnel) && api.tunnel_of(account, tunnel).await?.is_some() {
        left.push(format!("the tunnel {name} ({tunnel})"));
    }
    let records = match api.records_to(zone, tunnel).await {
        // The zone itself is gone.
        Err(error) if error.is_missing() => Vec::new(),
        found => found?,
    };
    for one in records.iter().filter(|one| record::is_removed(one, tunnel)) {
        // In a dry run such a record still leads elsewhere.
        let is_of_now = zone == now.zone && now.names.contains(&one.name);
        if !is_of_now {
            left.push(format!("the DNS record {}", one.name));
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::render::tests::settings;

    fn found(
        before: &Settings,
        tunnel: Option<&TunnelId>,
        zone: &CloudId,
        names: &[String],
    ) -> Vec<Footprint> {
        candidates(Some(before), &Now { tunnel, zone, names })
    }

    #[test]
    fn only_a_setup_of_another_place_or_with_other_names_may_have_left_something() {
        let before = settings();
        let names = |domain: &str| vec![format!("*.{domain}")];
        let other: TunnelId = "00000000-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("an id");
        let elsewhere: CloudId = "023e105f4ecef8ad9ca31a8372d0c354".parse().expect("an id");
        let (tunnel, zone, same) = (&before.tunnel, &before.zone, names("example.com"));
        assert_eq!(found(&before, Some(tunnel), zone, &same), [], "as it was");
        let own = [before.footprint()];
        assert_eq!(found(&before, Some(&other), zone, &same), own, "another tunnel");
        assert_eq!(found(&before, None, zone, &same), own, "one that is still to be made");
        assert_eq!(found(&before, Some(tunnel), &elsewhere, &same), own, "another zone");
        let named = names("a.example.com");
        assert_eq!(found(&before, Some(tunnel), zone, &named), own, "another domain");
        let now = Now { tunnel: None, zone, names: &same };
        assert_eq!(candidates(None, &now), [], "the first setup");

        // Each place once, the latest last.
        let older = Footprint { zone: elsewhere.clone(), ..before.footprint() };
        let earlier = vec![before.footprint(), older.clone()];
        let before = Settings { earlier: earlier.clone(), ..before.clone() };
        assert_eq!(found(&before, Some(tunnel), zone, &same), earlier);
        let all = [older, before.footprint()];
        assert_eq!(found(&before, Some(&other), zone, &same), all);
    }
}
