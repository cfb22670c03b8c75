//! An entry as the search reads it: once, and without copying what it does not keep.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// A text that is borrowed where it has no escapes. (`Cow` alone is so only as a field.)
#[derive(Default, Deserialize, Serialize)]
pub(super) struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// What the search takes from a leaf.
#[derive(Default, Deserialize)]
pub(in crate::audit) struct Leaf<'a> {
    #[serde(borrow)]
    pub time: Cow<'a, str>,
    #[serde(borrow)]
    pub room: Cow<'a, str>,
    #[serde(borrow)]
    pub action: Cow<'a, str>,
    #[serde(borrow)]
    pub outcome: Cow<'a, str>,
}

/// What it takes from the details.
#[derive(Default)]
pub(in crate::audit) struct Said<'a> {
    pub actor: Cow<'a, str>,
    pub resource: Cow<'a, str>,
    pub reason: Cow<'a, str>,
    pub request_id: Cow<'a, str>,
    pub trace_id: Cow<'a, str>,
}

/// Both.
#[derive(Default)]
pub(in crate::audit) struct Read<'a> {
    pub leaf: Leaf<'a>,
    pub said: Said<'a>,
}

/// Reads an entry; `each` is told every text and number of what it changed and signalled. What is not in form is not there.
pub(in crate::audit) fn entry<'a>(leaf: &'a [u8], details: Option<&'a [u8]>, each: &mut impl FnMut(&str)) -> Read<'a> {
    let leaf = serde_json::from_slice(leaf).unwrap_or_default();
    let said = details.map(|d| self::details(d, each)).unwrap_or_default();
    Read { leaf, said }
}

/// Reads the details alone.
pub(in crate::audit) fn details<'a>(details: &'a [u8], each: &mut impl FnMut(&str)) -> Said<'a> {
    Details(each).deserialize(&mut serde_json::Deserializer::from_slice(details)).unwrap_or_default()
}

struct Details<'f, F>(&'f mut F);

impl<'de, F: FnMut(&str)> DeserializeSeed<'de> for Details<'_, F> {
    type Value = Said<'de>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Said<'de>, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de, F: FnMut(&str)> Visitor<'de> for Details<'_, F> {
    type Value = Said<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Said<'de>, A::Error> {
        let mut said = Said::default();
        while let Some(Text(name)) = map.next_key()? {
            let field = match &*name {
                "actor" => &mut said.actor,
                "resource" => &mut said.resource,
                "reason" => &mut said.reason,
                "request_id" => &mut said.request_id,
                "trace_id" => &mut said.trace_id,
                "change" | "signal" => {
                    map.next_value_seed(Leaves(&mut *self.0))?;
                    continue;
                }
                // The decision is not text.
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            *field = map.next_value::<Text<'de>>()?.0;
        }
        Ok(said)
    }
}

/// Tells every text and number of a value.
struct Leaves<'f, F>(&'f mut F);

impl<'de, F: FnMut(&str)> DeserializeSeed<'de> for Leaves<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de, F: FnMut(&str)> Visitor<'de> for Leaves<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        (self.0)(text);
        Ok(())
    }

    fn visit_u64<E>(self, n: u64) -> Result<(), E> {
        (self.0)(&n.to_string());
        Ok(())
    }

    fn visit_i64<E>(self, n: i64) -> Result<(), E> {
        (self.0)(&n.to_string());
        Ok(())
    }

    fn visit_f64<E>(self, n: f64) -> Result<(), E> {
        (self.0)(&serde_json::Value::from(n).to_string());
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Leaves(&mut *self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(Leaves(&mut *self.0))?;
        }
        Ok(())
    }
}
