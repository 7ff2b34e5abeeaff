//! Tokens that are too weak: each missing permission is named.

use agent::tunnel::{
    api::{Error, Permission},
    setup,
};

use crate::{
    cloud::{Cloud, May},
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
