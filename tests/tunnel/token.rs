//! Tokens that are too weak: each missing permission is named.

use agent::tunnel::{
    api::{Error, Permission},
    setup,
};

use crate::{
    cloud::{ACCOUNT, Cloud, May, ZONE},
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
        assert!(error.to_string().contains(words), "{error}");
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
        assert!(matches!(error, Error::Token(_)) && error.to_string().contains(word), "{error}");
    }
}
