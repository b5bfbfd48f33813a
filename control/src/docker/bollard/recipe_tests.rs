use serde_json::{Value, json};

use super::*;

/// A user that the image decides.
const OF_IMAGE: User = User { user: None, requested: None, groups: None };

const ID: &str = "0123456789abcdef0123456789abcdef";

/// Returns the request body for a container with this inspection.
fn body(inspected: Value, image: Value) -> Value {
    let inspected = serde_json::from_value(inspected).unwrap();
    serde_json::to_value(recipe(inspected, &serde_json::from_value(image).unwrap(), "app", OF_IMAGE).body)
        .unwrap()
}

#[test]
fn the_new_image_decides_where_the_container_has_no_own_value() {
    let image = json!({
        "Env": ["PATH=/bin", "MODE=old"], "Cmd": ["serve"], "Entrypoint": ["/run"], "WorkingDir": "/old", "User": "app",
        "Labels": {"version": "1", "kept": "x"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}},
    });
    let inspected = json!({"Id": ID, "Config": {
        "Hostname": "0123456789ab", "Env": ["PATH=/bin", "MODE=mine", "TOKEN=t"], "Cmd": ["serve"],
        "Entrypoint": ["/run"], "WorkingDir": "/old", "User": "app", "Labels": {"version": "1", "kept": "y"},
        "ExposedPorts": {"80/tcp": {}, "8973/tcp": {}}, "Volumes": {"/data": {}, "/own": {}}, "Tty": true,
    }});
    let body = body(inspected, image);
    assert_eq!(body["Env"], json!(["MODE=mine", "TOKEN=t"]));
    assert_eq!(body["Labels"], json!({"kept": "y", "dev.landfall.user": ""}));
    assert_eq!(body["ExposedPorts"], json!({"8973/tcp": {}}));
    assert_eq!(body["Volumes"], json!({"/own": {}}));
    assert_eq!((&body["Tty"], &body["Image"]), (&json!(true), &json!("app")));
    for absent in ["Hostname", "Cmd", "Entrypoint", "WorkingDir", "User"] {
        assert!(body.get(absent).is_none(), "{absent}: {}", body[absent]);
    }
}

#[test]
fn an_own_command_is_kept_and_so_is_one_with_an_own_entrypoint() {
    let image = json!({"Cmd": ["serve"], "Entrypoint": ["/run"]});
    let own = |entrypoint: &str, cmd: &str| {
        body(json!({"Id": ID, "Config": {"Cmd": [cmd], "Entrypoint": [entrypoint]}}), image.clone())
    };
    assert_eq!(own("/run", "other")["Cmd"], json!(["other"]));
    assert_eq!(own("/other", "serve")["Cmd"], json!(["serve"]));
    assert_eq!(own("/other", "serve")["Entrypoint"], json!(["/other"]));
}

#[test]
fn anonymous_volumes_are_kept() {
    let volume = |name: &str, place: &str, rw: bool| json!({"Type": "volume", "Name": name, "Destination": place, "RW": rw});
    let inspected = json!({
        "Id": ID,
        "HostConfig": {
            "Binds": ["named:/named", "/host:/bind:ro"],
            "Mounts": [{"Type": "volume", "Target": "/mount"}],
        },
        "Mounts": [
            volume("named", "/named", true), volume("aaaa", "/data", true), volume("bbbb", "/cold", false),
            volume("cccc", "/mount", true), {"Type": "bind", "Source": "/host", "Destination": "/bind"},
        ],
    });
    let host = &body(inspected, json!({}))["HostConfig"];
    assert_eq!(host["Binds"], json!(["named:/named", "/host:/bind:ro", "aaaa:/data", "bbbb:/cold:ro"]));
    assert_eq!(host["Mounts"][0]["Source"], "cccc");
}

#[test]
fn networks_keep_requested_values_and_drop_generated_ones() {
    let inspected = json!({
        "Id": ID,
        "HostConfig": {"NetworkMode": "one"},
        "NetworkSettings": {"Networks": {
            "two": {"EndpointID": "e", "IPAddress": "10.2.0.9", "Aliases": ["0123456789ab"]},
            "one": {
                "IPAMConfig": {"IPv4Address": "10.1.0.7"}, "Aliases": ["web", "0123456789ab"],
                "EndpointID": "e", "IPAddress": "10.1.0.7", "MacAddress": "02:42:0a:01:00:07",
            },
        }},
    });
    let recipe = recipe(serde_json::from_value(inspected).unwrap(), &ImageConfig::default(), "app", OF_IMAGE);
    let body = serde_json::to_value(recipe.body).unwrap();
    assert_eq!(
        body["NetworkingConfig"]["EndpointsConfig"],
        json!({"one": {"IPAMConfig": {"IPv4Address": "10.1.0.7"}, "Aliases": ["web"]}})
    );
    assert_eq!(recipe.networks, [("two".to_owned(), EndpointSettings::default())]);
}

#[test]
fn a_container_on_the_network_of_another_has_no_host_name_and_no_network() {
    let inspected = json!({
        "Id": ID, "Config": {"Hostname": "other"}, "HostConfig": {"NetworkMode": "container:abc"},
        "NetworkSettings": {"Networks": {}},
    });
    let body = body(inspected, json!({}));
    assert!(body.get("Hostname").is_none() && body.get("NetworkingConfig").is_none());
    assert_eq!(body["HostConfig"]["NetworkMode"], "container:abc");
}

#[test]
fn the_determined_user_and_groups_are_set() {
    let inspected = json!({
        "Id": ID, "Config": {"User": "app"},
        "HostConfig": {"GroupAdd": ["www"], "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"], "Memory": 7},
    });
    let made = |user: User| {
        let inspected = serde_json::from_value(inspected.clone()).unwrap();
        serde_json::to_value(recipe(inspected, &ImageConfig::default(), "app", user).body).unwrap()
    };
    let requested = Some("app".to_owned());
    let pinned = made(User {
        user: Some("1:2".to_owned()),
        requested: requested.clone(),
        groups: Some(vec!["33".to_owned()]),
    });
    assert_eq!((&pinned["User"], &pinned["Labels"]["dev.landfall.user"]), (&json!("1:2"), &json!("app")));
    assert_eq!(pinned["HostConfig"]["GroupAdd"], json!(["33"]));
    let host = &pinned["HostConfig"];
    assert_eq!(
        (&host["CapDrop"], &host["SecurityOpt"], &host["Memory"]),
        (&json!(["ALL"]), &json!(["no-new-privileges"]), &json!(7))
    );
    let unpinned = made(User { user: requested.clone(), requested, groups: None });
    assert_eq!((&unpinned["User"], &unpinned["HostConfig"]["GroupAdd"]), (&json!("app"), &json!(["www"])));
}

#[test]
fn a_podman_container_keeps_its_network() {
    let inspected = |mode: &str, networks: Value| json!({"Id": ID, "HostConfig": {"NetworkMode": mode}, "NetworkSettings": {"Networks": networks}});
    let named = body(inspected("bridge", json!({"mine": {"IPAddress": "10.89.0.2"}})), json!({}));
    assert_eq!(named["HostConfig"]["NetworkMode"], "mine");
    assert_eq!(named["NetworkingConfig"]["EndpointsConfig"], json!({"mine": {}}));
    for mode in ["slirp4netns", "slirp4netns:mtu=1500", "pasta"] {
        let outbound = body(inspected(mode, json!({})), json!({}));
        assert_eq!(outbound["HostConfig"]["NetworkMode"], mode);
        assert!(outbound.get("NetworkingConfig").is_none());
    }
    let dockers = body(inspected("default", json!({"bridge": {}})), json!({}));
    assert_eq!(dockers["HostConfig"]["NetworkMode"], "default");
}
