//! Tokens that are too weak: each missing permission is named.

use agent::tunnel::{
    api::{Error, Permission},
    setup,
};

use crate::{
    cloud::{ACCOUNT, Cloud, Fault, May, ZONE},
    world::World,
};

async fn refused(may: May, token: Option<&'static str>) -> Error {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().may = may;
    cloud.state().token = token;
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
    let setup::Error::Api(error) = error else { panic!("{error}") };
    assert_eq!(cloud.writes(), [""; 0]);
    error
}

#[tokio::test]
async fn missing_permission_is_named() {
    let all = May { tunnels: true, dns: true, zones: true };
    for (may, expected, words) in [
        (
            May { zones: false, ..all },
            Permission::ZoneRead,
            "Zone > Zone > Read (or give --zone-id",
        ),
        (
            May { tunnels: false, ..all },
            Permission::TunnelEdit,
            "Account > Cloudflare Tunnel > Edit",
        ),
        (May { dns: false, ..all }, Permission::DnsEdit, "Zone > DNS > Edit"),
    ] {
        let error = refused(may, Some("active")).await;
        assert!(
            matches!(&error, Error::Lacks { permission, .. } if *permission == expected),
            "{error}"
        );
        let told = error.to_string();
        assert!(told.contains(words), "{told}");
        assert!(told.contains("Authentication error (10000)"), "Cloudflare's own words: {told}");
    }
}

#[tokio::test]
async fn missing_permission_of_an_accounts_token_is_named() {
    let all = May { tunnels: true, dns: true, zones: true };
    for (may, expected) in [
        (May { tunnels: false, ..all }, Permission::TunnelEdit),
        (May { dns: false, ..all }, Permission::DnsEdit),
    ] {
        let (cloud, world) = (Cloud::start().await, World::new());
        cloud.state().may = may;
        cloud.state().token_of_account = true;
        let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
        assert!(
            matches!(&error, setup::Error::Api(Error::Lacks { permission, .. }) if *permission == expected),
            "{error}"
        );
    }
}

#[tokio::test]
async fn accounts_token_that_sees_no_zone_is_enough_with_both_ids() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().may.zones = false;
    cloud.state().token_of_account = true;
    // Without an account nobody can verify it: both reasons are told, and how to find out.
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused").to_string();
    for word in ["it is unknown", "belongs to an account", "Zone > Zone > Read", "--account-id"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    let account = Some(ACCOUNT.parse().expect("an id"));
    let order = setup::Order { account, start: false, ..world.order() };
    let error = world.setup(&cloud, &order).await.1.expect_err("no zone").to_string();
    assert!(error.contains("lacks a permission: Zone > Zone > Read"), "{error}");
    let order = setup::Order { zone: Some(ZONE.parse().expect("an id")), ..order };
    world.setup(&cloud, &order).await.1.expect("set up");
}

#[tokio::test]
async fn token_that_is_worth_nothing_is_told_from_a_weak_one() {
    let all = May { tunnels: true, dns: true, zones: true };
    for (token, word) in [
        (Some("expired"), "it is expired"),
        (Some("disabled"), "it is disabled"),
        (None, "it is unknown"),
    ] {
        let error = refused(all, token).await;
        let told = error.to_string();
        assert!(matches!(error, Error::Token { .. }) && told.contains(word), "{told}");
        assert!(told.contains("Authentication error (10000)"), "Cloudflare's own words: {told}");
    }
}

#[tokio::test]
async fn token_is_not_called_unknown_where_cloudflare_does_not_say_so() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().may.zones = false;
    // The first call is refused, and the question for the token's state fails.
    cloud.state().fault = Some((1, Fault::Refused));
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
    assert!(matches!(error, setup::Error::Api(Error::Refused { status: 403, .. })), "{error}");
    assert!(error.to_string().contains("Authentication error (10000)"), "{error}");
}

#[tokio::test]
async fn question_for_the_tokens_state_waits_its_turn() {
    let (cloud, world) = (Cloud::start().await, World::new());
    cloud.state().may.zones = false;
    cloud.state().busy.extend(["", "0"]);
    let error = world.setup(&cloud, &world.order()).await.1.expect_err("refused");
    assert!(matches!(error, setup::Error::Api(Error::Lacks { .. })), "{error}");
    let asked: Vec<_> =
        cloud.calls().into_iter().filter(|call| call.ends_with("/tokens/verify")).collect();
    assert_eq!(asked.len(), 1, "the one that was answered: {asked:?}");
}
