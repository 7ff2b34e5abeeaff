//! `tunnel setup` with the variables of older setups: they count where a flag is missing, and a wrong one is told.

use crate::{
    cloud::{ACCOUNT, ZONE, zone},
    documents::Installed,
};

/// Setup without a flag for the domain, the zone or the account.
const SETUP: &str = "pve-sandbox-agent tunnel setup --token-file /root/cloudflare-token --no-start";
/// A zone of another domain.
const ELSEWHERE: &str = "023e105f4ecef8ad9ca31a8372d0c354";
/// An identifier that Cloudflare does not know.
const UNKNOWN: &str = "ffffffffffffffffffffffffffffffff";

fn of(variables: &[(&str, &str)], name: &str) -> Option<String> {
    let found = variables.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| (*value).to_owned())
}

fn seed(name: &str) -> Option<String> {
    of(&[("CF_DOMAIN", "example.com"), ("CF_ZONE_ID", ZONE), ("CF_ACCOUNT_ID", ACCOUNT)], name)
}

fn wrong(name: &str) -> Option<String> {
    let all = [("CF_DOMAIN", "example.org"), ("CF_ZONE_ID", UNKNOWN), ("CF_ACCOUNT_ID", UNKNOWN)];
    of(&all, name)
}

#[tokio::test]
async fn variables_count_where_flags_are_missing() {
    let node = Installed::with(seed).await;
    // What is given is not looked up.
    node.cloud.state().may.zones = false;
    let (said, done) = node.run(SETUP).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    let settings = node.world.settings();
    let found = [settings.domain.to_string(), settings.zone.into(), settings.account.into()];
    assert_eq!(found, ["example.com", ZONE, ACCOUNT]);
}

#[tokio::test]
async fn flags_count_before_variables() {
    let node = Installed::with(wrong).await;
    let flags = format!("{SETUP} --domain example.com --zone-id {ZONE} --account-id {ACCOUNT}");
    let (said, done) = node.run(&flags).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    let settings = node.world.settings();
    let found = [settings.domain.to_string(), settings.zone.into(), settings.account.into()];
    assert_eq!(found, ["example.com", ZONE, ACCOUNT]);
}

#[tokio::test]
async fn account_in_the_variable_that_is_not_the_zones_is_refused_before_anything_is_made() {
    let stale = |name: &str| of(&[("CF_ACCOUNT_ID", UNKNOWN)], name);
    let node = Installed::with(stale).await;
    let (_, done) = node.run(&format!("{SETUP} --domain example.com")).await;
    let told = format!("{:#}", done.expect_err("another account"));
    for word in [UNKNOWN, ACCOUNT, "CF_ACCOUNT_ID"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    assert_eq!(node.cloud.writes(), [""; 0]);
}

#[tokio::test]
async fn name_of_the_tunnel_stays_in_a_later_call_without_it() {
    let node = Installed::start().await;
    let named = format!("{SETUP} --domain example.com --name office");
    let (said, done) = node.run(&named).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    node.cloud.calls();
    // As the remedies of `doctor` say it.
    let (said, done) = node.run(SETUP).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    assert_eq!((node.cloud.writes(), node.world.settings().name), (vec![], "office".to_owned()));
}

#[tokio::test]
async fn variable_of_this_project_counts_before_that_of_older_setups() {
    let both = |name: &str| {
        of(&[("PVE_PUBLIC_DOMAIN", "example.com"), ("CF_DOMAIN", "example.org")], name)
    };
    let node = Installed::with(both).await;
    let (said, done) = node.run(SETUP).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    assert_eq!(node.world.settings().domain.as_str(), "example.com");
}

#[tokio::test]
async fn empty_variables_count_as_none() {
    let empty = |name: &str| name.starts_with("CF_").then(String::new);
    let node = Installed::with(empty).await;
    let (said, done) = node.run(&format!("{SETUP} --domain example.com")).await;
    done.unwrap_or_else(|error| panic!("{error:#}\n{said}"));
    assert_eq!(String::from(node.world.settings().zone), ZONE, "looked up");
}

/// Variables of a node, by their names.
type Variables = fn(&str) -> Option<String>;

#[tokio::test]
async fn wrong_zone_in_the_variable_is_told_before_anything_is_made() {
    let malformed = |name: &str| of(&[("CF_ZONE_ID", "example.com")], name);
    let elsewhere = |name: &str| of(&[("CF_ZONE_ID", ELSEWHERE)], name);
    let unknown = |name: &str| of(&[("CF_ZONE_ID", UNKNOWN)], name);
    let cases: [(Variables, &[&str]); 3] = [
        (malformed, &["CF_ZONE_ID", "32 hexadecimal digits"]),
        (elsewhere, &["example.net", "CF_ZONE_ID"]),
        (unknown, &["Invalid zone identifier"]),
    ];
    for (env, words) in cases {
        let node = Installed::with(env).await;
        node.cloud.state().zones.push(zone(ELSEWHERE, "example.net"));
        let (_, done) = node.run(&format!("{SETUP} --domain example.com")).await;
        let told = format!("{:#}", done.expect_err("a wrong zone"));
        assert!(words.iter().all(|word| told.contains(word)), "{words:?}: {told}");
        assert_eq!(node.cloud.writes(), [""; 0], "{told}");
    }
}
