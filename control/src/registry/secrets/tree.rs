//! JSON that keeps the order of its members. Pure. The unpatched parts of the file keep their order, since users read this
//! file and compare versions of it.

use std::collections::HashMap;
use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Number, Value};

/// One JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Tree {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number. More digits than 64 bits can represent are rounded.
    Number(Number),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Tree>),
    /// An object. Each name is present once, in the order of first appearance.
    Object(Vec<(String, Tree)>),
}

impl Tree {
    /// Returns an empty object.
    pub fn empty() -> Tree {
        Tree::Object(Vec::new())
    }

    /// Returns the value of a member, if this is an object that has it.
    pub fn find(&self, name: &str) -> Option<&Tree> {
        let Tree::Object(members) = self else { return None };
        members.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// Returns the value of a member for modification, and inserts `default` if it is missing. `None` if this is not an
    /// object.
    pub fn entry(&mut self, name: &str, default: Tree) -> Option<&mut Tree> {
        let Tree::Object(members) = self else { return None };
        let place = members.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            members.push((name.to_owned(), default));
            members.len() - 1
        });
        members.get_mut(place).map(|(_, value)| value)
    }
}

impl From<&Value> for Tree {
    fn from(value: &Value) -> Tree {
        match value {
            Value::Null => Tree::Null,
            Value::Bool(bool) => Tree::Bool(*bool),
            Value::Number(number) => Tree::Number(number.clone()),
            Value::String(text) => Tree::Text(text.clone()),
            Value::Array(list) => Tree::List(list.iter().map(Tree::from).collect()),
            Value::Object(members) => {
                Tree::Object(members.iter().map(|(name, value)| (name.clone(), Tree::from(value))).collect())
            }
        }
    }
}

impl Serialize for Tree {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Tree::Null => serializer.serialize_unit(),
            Tree::Bool(bool) => serializer.serialize_bool(*bool),
            Tree::Number(number) => number.serialize(serializer),
            Tree::Text(text) => serializer.serialize_str(text),
            Tree::List(list) => {
                let mut sequence = serializer.serialize_seq(Some(list.len()))?;
                for item in list {
                    sequence.serialize_element(item)?;
                }
                sequence.end()
            }
            Tree::Object(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (name, value) in members {
                    map.serialize_entry(name, value)?;
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Tree, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, bool: bool) -> Result<Tree, E> {
        Ok(Tree::Bool(bool))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Tree, E> {
        Ok(Tree::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Tree, E> {
        Ok(Tree::Number(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Tree, E> {
        Ok(Number::from_f64(number).map_or(Tree::Null, Tree::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Tree, E> {
        Ok(Tree::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
        let mut members: Vec<(String, Tree)> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        while let Some((name, value)) = entries.next_entry::<String, Tree>()? {
            // If a name occurs twice, the last value is used, at the position of the first.
            match places.get(&name).and_then(|place| members.get_mut(*place)) {
                Some((_, earlier)) => *earlier = value,
                None => {
                    places.insert(name.clone(), members.len());
                    members.push((name, value));
                }
            }
        }
        Ok(Tree::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn order_is_kept_and_the_last_of_two_equal_names_is_used() {
        let text = r#"{"b":1,"a":[true,null,-2,1.5,18446744073709551615],"c":{"z":"é\n","y":{}},"b":2}"#;
        let tree: Tree = serde_json::from_str(text).unwrap();
        let written = serde_json::to_string(&tree).unwrap();
        assert_eq!(written, r#"{"b":2,"a":[true,null,-2,1.5,18446744073709551615],"c":{"z":"é\n","y":{}}}"#);
    }

    #[test]
    fn text_that_is_not_json_or_too_deep_is_an_error() {
        for wrong in ["", "{", "{}x", "[1,]", &"[".repeat(100_000)] {
            assert!(serde_json::from_str::<Tree>(wrong).is_err(), "{}", &wrong[..wrong.len().min(9)]);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i32>().prop_map(|number| Value::from(f64::from(number) / 8.0)),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn json_survives_a_round_trip(value in any_json()) {
            let tree: Tree = serde_json::from_str(&value.to_string()).unwrap();
            prop_assert_eq!(&tree, &Tree::from(&value));
            let again: Value = serde_json::from_str(&serde_json::to_string(&tree).unwrap()).unwrap();
            prop_assert_eq!(again, value);
        }
    }
}
