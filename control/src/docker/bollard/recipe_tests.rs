use serde_json::{Value, json};

use super::*;

/// A user whom the image decides.
const OF_IMAGE: User = User { user: None, asked: None, groups: None };

const ID: &str = "0123456789abcdef0123456789abcdef";

/// The body that Docker gets for a container of which it told this.
fn body(told: Value, image: Value) -> Value {
    let told = serde_json::from_value(told).unwrap();
    serde_json::to_value(recipe(told, &serde_json::from_value(image).unwrap(), "app", OF_IMAGE).body).unwrap()
}

#[test]
fn the_new_image_has_the_say_where_the_container_had_none() {
    let image = json!({
        "Env": ["PATH=/bin", "MODE=old"], "Cmd": ["serve"], "Entrypoint": ["/run"], "WorkingDir": "/old", "User": "app",
        "Labels": {"version": "1", "kept": "x"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/data": {}},
    });
    let told = json!({"Id": ID, "Config": {
        "Hostname": "0123456789ab", "Env": ["PATH=/bin", "MODE=mine", "TOKEN=t"], "Cmd": ["serve"],
        "Entrypoint": ["/run"], "WorkingDir": "/old", "User": "app", "Labels": {"version": "1", "kept": "y"},
        "ExposedPorts": {"80/tcp": {}, "8973/tcp": {}}, "Volumes": {"/data": {}, "/own": {}}, "Tty": true,
    }});
    let body = body(told, image);
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
fn a_command_of_its_own_stays_and_one_behind_an_entrypoint_of_its_own_too() {
    let image = json!({"Cmd": ["serve"], "Entrypoint": ["/run"]});
    let own = |entrypoint: &str, cmd: &str| {
        body(json!({"Id": ID, "Config": {"Cmd": [cmd], "Entrypoint": [entrypoint]}}), image.clone())
    };
    assert_eq!(own("/run", "other")["Cmd"], json!(["other"]));
    assert_eq!(own("/other", "serve")["Cmd"], json!(["serve"]));
    assert_eq!(own("/other", "serve")["Entrypoint"], json!(["/other"]));
}

#[test]
fn volumes_without_a_name_are_handed_on() {
    let volume = |name: &str, place: &str, rw: bool| json!({"Type": "volume", "Name": name, "Destination": place, "RW": rw});
    let told = json!({
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
    let host = &body(told, json!({}))["HostConfig"];
    assert_eq!(host["Binds"], json!(["named:/named", "/host:/bind:ro", "aaaa:/data", "bbbb:/cold:ro"]));
    assert_eq!(host["Mounts"][0]["Source"], "cccc");
}

#[test]
fn networks_keep_what_was_asked_of_them_and_not_what_docker_made_up() {
    let told = json!({
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
    let recipe = recipe(serde_json::from_value(told).unwrap(), &ImageConfig::default(), "app", OF_IMAGE);
    let body = serde_json::to_value(recipe.body).unwrap();
    assert_eq!(
        body["NetworkingConfig"]["EndpointsConfig"],
        json!({"one": {"IPAMConfig": {"IPv4Address": "10.1.0.7"}, "Aliases": ["web"]}})
    );
    assert_eq!(recipe.networks, [("two".to_owned(), EndpointSettings::default())]);
}

#[test]
fn a_container_on_anothers_network_has_no_name_and_no_network_of_its_own() {
    let told = json!({
        "Id": ID, "Config": {"Hostname": "other"}, "HostConfig": {"NetworkMode": "container:abc"},
        "NetworkSettings": {"Networks": {}},
    });
    let body = body(told, json!({}));
    assert!(body.get("Hostname").is_none() && body.get("NetworkingConfig").is_none());
    assert_eq!(body["HostConfig"]["NetworkMode"], "container:abc");
}

#[test]
fn the_user_and_the_groups_are_those_that_were_decided_on() {
    let told = json!({
        "Id": ID, "Config": {"User": "app"},
        "HostConfig": {"GroupAdd": ["www"], "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges"], "Memory": 7},
    });
    let made = |user: User| {
        let told = serde_json::from_value(told.clone()).unwrap();
        serde_json::to_value(recipe(told, &ImageConfig::default(), "app", user).body).unwrap()
    };
    let asked = Some("app".to_owned());
    let pinned = made(User {
        user: Some("1:2".to_owned()),
        asked: asked.clone(),
        groups: Some(vec!["33".to_owned()]),
    });
    assert_eq!((&pinned["User"], &pinned["Labels"]["dev.landfall.user"]), (&json!("1:2"), &json!("app")));
    assert_eq!(pinned["HostConfig"]["GroupAdd"], json!(["33"]));
    let host = &pinned["HostConfig"];
    assert_eq!(
        (&host["CapDrop"], &host["SecurityOpt"], &host["Memory"]),
        (&json!(["ALL"]), &json!(["no-new-privileges"]), &json!(7))
    );
    let unpinned = made(User { user: asked.clone(), asked, groups: None });
    assert_eq!((&unpinned["User"], &unpinned["HostConfig"]["GroupAdd"]), (&json!("app"), &json!(["www"])));
}

#[test]
fn a_container_of_podmans_keeps_the_network_that_it_is_on() {
    let told = |mode: &str, networks: Value| json!({"Id": ID, "HostConfig": {"NetworkMode": mode}, "NetworkSettings": {"Networks": networks}});
    let named = body(told("bridge", json!({"mine": {"IPAddress": "10.89.0.2"}})), json!({}));
    assert_eq!(named["HostConfig"]["NetworkMode"], "mine");
    assert_eq!(named["NetworkingConfig"]["EndpointsConfig"], json!({"mine": {}}));
    for mode in ["slirp4netns", "slirp4netns:mtu=1500", "pasta"] {
        let outbound = body(told(mode, json!({})), json!({}));
        assert_eq!(outbound["HostConfig"]["NetworkMode"], mode);
        assert!(outbound.get("NetworkingConfig").is_none());
    }
    let dockers = body(told("default", json!({"bridge": {}})), json!({}));
    assert_eq!(dockers["HostConfig"]["NetworkMode"], "default");
}
