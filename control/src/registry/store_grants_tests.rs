//! Grants through the registry, with daemons that stop and start in between.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::json;

use super::tests::Bench;
use super::*;

fn registration(cwd: &str) -> Registration {
    let fields = json!({"containerName": "shop", "cwd": cwd, "way": {"kind": "docker"}});
    Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
}

fn name() -> ContainerName {
    ContainerName::new("shop").unwrap()
}

fn file(bench: &Bench) -> PathBuf {
    bench.folder.path().join("run/grants/shop.json")
}

async fn register(bench: &Bench, cwd: &str) {
    bench.registry.register(registration(cwd)).await.unwrap();
}

async fn grant(bench: &Bench) {
    bench.registry.grant("shop", vec![Right::Rebuild]).await.unwrap();
}

/// Whether the registered container may rebuild.
fn may(bench: &Bench) -> bool {
    let registered = bench.registry.list();
    registered.find("shop").is_some_and(|shop| bench.registry.grants().has_right(Right::Rebuild, shop))
}

#[tokio::test]
async fn only_a_registered_container_is_granted_a_right() {
    let bench = Bench::new();
    let refused = bench.registry.grant("shop", vec![Right::Rebuild]).await.unwrap_err();
    assert_eq!(refused.to_string(), "not registered: shop");
    register(&bench, "/a").await;
    assert!(!may(&bench));
    grant(&bench).await;
    assert!(may(&bench));
    let mode = std::fs::metadata(file(&bench)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn registering_again_neither_gives_nor_takes_a_grant() {
    let bench = Bench::new();
    register(&bench, "/a").await;
    grant(&bench).await;
    register(&bench, "/a").await;
    assert!(may(&bench));
    register(&bench, "/b").await;
    assert!(!may(&bench), "a grant is bound to its folder");
    register(&bench, "/a").await;
    assert!(may(&bench));
    let bench = bench.next().await;
    bench.registry.replayed().await;
    assert!(may(&bench), "a grant outlives the daemon");
    for reason in [DropReason::Gone, DropReason::Requested] {
        bench.registry.deregister("shop", reason).await;
        register(&bench, "/a").await;
        assert!(may(&bench), "a grant outlives its registration");
    }
}

#[tokio::test]
async fn revoke_and_the_users_deregister_remove_a_grant() {
    let bench = Bench::new();
    register(&bench, "/a").await;
    grant(&bench).await;
    bench.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    assert!(!may(&bench) && !file(&bench).exists());
    bench.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    grant(&bench).await;
    bench.registry.deregister_with_grants("shop").await;
    assert!(!file(&bench).exists());
    register(&bench, "/a").await;
    assert!(!may(&bench));
    let bench = bench.next().await;
    bench.registry.replayed().await;
    assert!(!may(&bench));
    // Of a name that is not registered, too.
    grant(&bench).await;
    bench.registry.deregister("shop", DropReason::Gone).await;
    bench.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap();
    register(&bench, "/a").await;
    assert!(!may(&bench));
}

#[tokio::test]
async fn a_word_of_no_right_changes_nothing() {
    let bench = Bench::new();
    register(&bench, "/a").await;
    grant(&bench).await;
    let what = vec!["rebuild".to_owned(), "everything".to_owned()];
    let refused = bench.registry.revoke(name(), what).await.unwrap_err();
    assert_eq!(refused.to_string(), "unknown grant: everything");
    assert!(may(&bench));
}

#[tokio::test]
async fn a_right_that_comes_with_the_registration_cannot_be_revoked() {
    let bench = Bench::new();
    let fields = json!({"containerName": "shop", "cwd": "/a"});
    let reference = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
    bench.registry.register(reference).await.unwrap();
    assert!(may(&bench));
    let refused = bench.registry.revoke(name(), vec!["rebuild".to_owned()]).await.unwrap_err();
    assert!(matches!(refused, GrantError::OfRegistration(Right::Rebuild, _)), "{refused}");
}

#[tokio::test]
async fn a_file_of_a_newer_build_is_kept_and_grants_nothing() {
    let bench = Bench::new();
    let newer = "{\"containerName\":\"shop\",\"formatVersion\":9,\"grants\":{\"rebuild\":[\"/a\"]}}\n";
    std::fs::write(file(&bench), newer).unwrap();
    let bench = bench.next().await;
    register(&bench, "/a").await;
    assert!(!may(&bench));
    let refused = bench.registry.grant("shop", vec![Right::Rebuild]).await.unwrap_err();
    assert!(matches!(refused, GrantError::InvalidFile(..)), "{refused}");
    assert_eq!(std::fs::read_to_string(file(&bench)).unwrap(), newer);
    bench.registry.deregister_with_grants("shop").await;
    let aside = file(&bench).with_extension("json.bad-1");
    assert_eq!(std::fs::read_to_string(aside).unwrap(), newer, "what the user removes is set aside");
}
