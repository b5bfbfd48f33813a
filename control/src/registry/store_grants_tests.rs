//! Grants through the registry, with daemons that stop and start in between.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::json;

use super::tests::Fixture;
use super::*;

fn registration(cwd: &str) -> Registration {
    let fields = json!({"containerName": "shop", "cwd": cwd, "way": {"kind": "docker"}});
    Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
}

fn name() -> ContainerName {
    ContainerName::new("shop").unwrap()
}

fn file(fixture: &Fixture) -> PathBuf {
    fixture.folder.path().join("run/grants/shop.json")
}

async fn register(fixture: &Fixture, cwd: &str) {
    fixture.registry.register(registration(cwd)).await.unwrap();
}

async fn grant(fixture: &Fixture) {
    fixture.registry.grant("shop", vec![Right::Rebuild]).await.unwrap();
}

/// Returns whether the registered container may rebuild.
fn may_rebuild(fixture: &Fixture) -> bool {
    let registered = fixture.registry.list();
    registered.find("shop").is_some_and(|shop| fixture.registry.grants().has_right(Right::Rebuild, shop))
}

#[tokio::test]
async fn only_a_registered_container_is_granted_a_right() {
    let fixture = Fixture::new();
    let refused = fixture.registry.grant("shop", vec![Right::Rebuild]).await.unwrap_err();
    assert_eq!(refused.to_string(), "not registered: shop");
    register(&fixture, "/a").await;
    assert!(!may_rebuild(&fixture));
    grant(&fixture).await;
    assert!(may_rebuild(&fixture));
    let mode = std::fs::metadata(file(&fixture)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn registering_again_does_not_change_grants() {
    let fixture = Fixture::new();
    register(&fixture, "/a").await;
    grant(&fixture).await;
    register(&fixture, "/a").await;
    assert!(may_rebuild(&fixture));
    register(&fixture, "/b").await;
    assert!(!may_rebuild(&fixture), "a grant is bound to its folder");
    register(&fixture, "/a").await;
    assert!(may_rebuild(&fixture));
    let fixture = fixture.next().await;
    fixture.registry.replayed().await;
    assert!(may_rebuild(&fixture), "a grant outlives the daemon");
    for reason in [DropReason::Gone, DropReason::Requested] {
        fixture.registry.deregister("shop", reason).await;
        register(&fixture, "/a").await;
        assert!(may_rebuild(&fixture), "a grant outlives its registration");
    }
}

#[tokio::test]
async fn revoke_and_the_users_deregister_remove_a_grant() {
    let fixture = Fixture::new();
    register(&fixture, "/a").await;
    grant(&fixture).await;
    fixture.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    assert!(!may_rebuild(&fixture) && !file(&fixture).exists());
    fixture.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    grant(&fixture).await;
    fixture.registry.deregister_with_grants("shop").await;
    assert!(!file(&fixture).exists());
    register(&fixture, "/a").await;
    assert!(!may_rebuild(&fixture));
    let fixture = fixture.next().await;
    fixture.registry.replayed().await;
    assert!(!may_rebuild(&fixture));
    // The same for a name that is not registered.
    grant(&fixture).await;
    fixture.registry.deregister("shop", DropReason::Gone).await;
    fixture.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    register(&fixture, "/a").await;
    assert!(!may_rebuild(&fixture));
}

#[tokio::test]
async fn revoking_an_unknown_right_changes_nothing() {
    let fixture = Fixture::new();
    register(&fixture, "/a").await;
    grant(&fixture).await;
    let what = vec!["rebuild".to_owned(), "everything".to_owned()];
    let refused = fixture.registry.revoke(name(), what).await.unwrap_err();
    assert_eq!(refused.to_string(), "unknown grant: everything");
    assert!(may_rebuild(&fixture));
}

#[tokio::test]
async fn a_right_that_comes_with_the_registration_cannot_be_revoked() {
    let fixture = Fixture::new();
    let fields = json!({"containerName": "shop", "cwd": "/a"});
    let reference = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
    fixture.registry.register(reference).await.unwrap();
    assert!(may_rebuild(&fixture));
    let refused = fixture.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap_err();
    assert!(matches!(refused, GrantError::OfRegistration(Right::Rebuild, _)), "{refused}");
}

#[tokio::test]
async fn a_file_of_a_newer_build_is_kept_and_grants_nothing() {
    let fixture = Fixture::new();
    let newer = "{\"containerName\":\"shop\",\"formatVersion\":9,\"grants\":{\"rebuild\":[\"/a\"]}}\n";
    std::fs::write(file(&fixture), newer).unwrap();
    let fixture = fixture.next().await;
    register(&fixture, "/a").await;
    assert!(!may_rebuild(&fixture));
    let refused = fixture.registry.grant("shop", vec![Right::Rebuild]).await.unwrap_err();
    assert!(matches!(refused, GrantError::InvalidFile(..)), "{refused}");
    assert_eq!(std::fs::read_to_string(file(&fixture)).unwrap(), newer);
    fixture.registry.deregister_with_grants("shop").await;
    let aside = file(&fixture).with_extension("json.bad-1");
    assert_eq!(std::fs::read_to_string(aside).unwrap(), newer, "the removed file is set aside");
}
